"""Metadata: hashes as sd-scripts computes them, dims and alphas that are true, and a host whose own stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core.factories import mixed_updates, random_update
from safetensors.torch import load_file

from lora_compress import CompressionSettings, LowRankUpdate, compress, load_lora, save

HOST = {
    "ss_network_dim": "8",
    "ss_network_alpha": "3.0",
    "ss_tag": 'a "quoted" \u00e9',
    "modelspec.title": "x",
    "sshs_model_hash": "old",
}


@pytest.mark.parametrize(
    "values", [{"bits": 4}, {"save_format": "fp8"}, {"rank_ratio": 0.5}, {"bits": 8, "save_format": "both"}], ids=str
)
def test_hashes_are_those_of_sd_scripts(values: dict[str, object], tmp_path: Path, sd_scripts: Path) -> None:
    from library import train_util

    path = tmp_path / "lora.safetensors"
    big = random_update(rank=64, inputs=20000, outputs=20000)  # past the 1 MiB at which the old hash begins
    save(compress({**mixed_updates(), "lora_unet_big": big}, CompressionSettings.parse(values), metadata=HOST), path)
    for file in tmp_path.iterdir():
        metadata = load_lora(file).metadata
        theirs = train_util.precalculate_safetensors_hashes(load_file(file), metadata)
        assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == theirs


@pytest.mark.parametrize(
    ("values", "ratio", "dim", "alpha"),
    [
        ({"bits": 4}, 1.0, "8", "8.0"),
        ({"bits": 4}, 0.5, "Dynamic", "Dynamic"),
        ({}, 1.0, "8", "1.0"),
        ({}, 0.5, "Dynamic", "1.0"),
    ],
)
def test_dim_and_alpha_tell_what_the_file_holds(
    values: dict[str, object], ratio: float, dim: str, alpha: str, tmp_path: Path
) -> None:
    path = tmp_path / "lora.safetensors"
    save(compress(mixed_updates(), CompressionSettings.parse({**values, "rank_ratio": ratio, "min_rank": 1}), metadata=HOST), path)
    file = load_lora(path)
    assert file.metadata["ss_network_dim"] == dim
    assert file.metadata["ss_network_alpha"] == alpha
    if dim != "Dynamic":
        assert {str(update.rank) for update in file.updates.values()} == {dim}
    if alpha != "Dynamic":
        assert {str(update.alpha) for update in file.updates.values()} == {alpha}


def test_each_of_two_files_tells_its_own_truth(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    one = {"lora_unet_a": random_update(rank=1)}
    save(compress(one, CompressionSettings.parse({"bits": 8, "save_format": "both"}), metadata=HOST), path)
    packed, plain = load_lora(path).metadata, load_lora(tmp_path / "lora.kohya.safetensors").metadata
    assert (packed["ss_network_dim"], packed["ss_network_alpha"]) == ("1", "1.0")
    assert (plain["ss_network_dim"], plain["ss_network_alpha"]) == ("2", "1.0")  # rank 1 is padded there
    assert (packed["ss_compress_save_format"], plain["ss_compress_save_format"]) == ("both", "kohya")
    assert packed["sshs_model_hash"] != plain["sshs_model_hash"]


def test_the_hosts_metadata_is_copied_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    host = dict(HOST)
    save(compress(mixed_updates(), CompressionSettings.parse({"bits": 4}), metadata=host), path)
    assert host == HOST
    saved = load_lora(path).metadata
    assert saved["ss_tag"] == HOST["ss_tag"]
    assert saved["modelspec.title"] == "x"
    assert saved["sshs_model_hash"] != "old"


def test_no_dim_is_invented_where_the_host_gave_none(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save(compress(mixed_updates(), CompressionSettings.parse({"bits": 4})), path)
    assert not {"ss_network_dim", "ss_network_alpha"} & load_lora(path).metadata.keys()


def test_nothing_of_an_earlier_compression_remains(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(compress(mixed_updates(), CompressionSettings.parse({"bits": 4})), first)
    packed = load_lora(first)
    updates: dict[str, LowRankUpdate] = packed.updates
    save(compress(updates, CompressionSettings.parse({"rank_ratio": 0.5}), torch.float16, packed.metadata), second)
    again = load_lora(second)
    assert not again.packed
    assert "lora_compress_format" not in again.metadata
    assert "ss_compress_group_size" not in again.metadata
    assert again.metadata["ss_compress_bits"] == "16"
