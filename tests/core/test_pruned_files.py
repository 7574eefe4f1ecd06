"""Files without the channels and layers that hardly matter: what is left, what is zero, what it saves and what must stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core.layouts.files import dense, random, save
from core.samples import CARRIED, dense_file, kohya_file, relative_error, sample
from safetensors.torch import load_file

from lora_compress import CompressionSettings, load_lora
from lora_compress.engine.to_file import compress_file
from lora_compress.packed.file import PackedFile


def settings(**values: object) -> CompressionSettings:
    return CompressionSettings.parse(values)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return kohya_file(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("values", [{"bits": 8}, {"strategy": "entropy", "bits": 6}, {"strategy": "mixed", "bits": 5}], ids=str)
def test_dropped_channels_save_bytes_and_decode_to_zeros(values: dict[str, object], source: Path, tmp_path: Path) -> None:
    whole = compress_file(source, tmp_path / "whole.safetensors", settings(**values))
    report = compress_file(source, tmp_path / "few.safetensors", settings(**values, channel_threshold=0.6))
    if "bits" in values and "strategy" not in values:
        assert report.bytes[1] < 0.85 * whole.bytes[1]
    assert report.bytes[1] < whole.bytes[1]
    exact, found = dense_file(source), PackedFile(tmp_path / "few.safetensors")
    dropped = 0
    for name, entry in found.entries.items():
        matrix = dense(found[name]).reshape(entry.outputs, entry.inputs, -1)
        original = exact[name].reshape(matrix.shape)
        norms = original.square().sum(dim=(0, 2)).sqrt(), original.square().sum(dim=(1, 2)).sqrt()
        for kept, norm, axis in ((entry.kept[1], norms[0], 1), (entry.kept[0], norms[1], 0)):
            strong = (norm >= 0.6 * norm.square().mean().sqrt()).nonzero().flatten().tolist()
            assert (list(range(len(norm))) if kept is None else list(kept)) == strong
            gone = sorted(set(range(len(norm))) - set(strong))
            dropped += len(gone)
            assert not matrix.index_select(axis, torch.tensor(gone, dtype=torch.int64)).any()
    assert dropped > 50
    assert relative_error(dict(found), exact) == pytest.approx(report.relative_error, rel=1e-3)


def test_a_plain_file_of_dropped_channels_has_zeros_and_says_that_they_save_nothing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "few.safetensors"
    report = compress_file(source, target, settings(new_rank=8, channel_threshold=0.6))
    whole = compress_file(source, tmp_path / "whole.safetensors", settings(new_rank=8))
    factors = [tensor for key, tensor in load_file(target).items() if "down" in key]
    assert all(
        bool((factor.flatten(2) if factor.ndim > 2 else factor[..., None]).eq(0).all(dim=(0, 2)).any()) for factor in factors
    )
    assert load_file(target).keys() == load_file(tmp_path / "whole.safetensors").keys()
    assert abs(report.bytes[1] - whole.bytes[1]) < 100
    assert any("channel" in note and "no bytes" in note for note in report.notes), report.notes
    assert not any("channel" in note for note in whole.notes)


def test_layers_below_the_threshold_go_with_what_belongs_to_them(tmp_path: Path) -> None:
    tensors, norms = {}, {}
    for index, magnitude in enumerate((1.0, 0.5, 0.02, 0.01)):
        name = f"lora_unet_down_blocks_0_layer_{index}"
        made, matrix = sample("kohya", name, 30, 30, 4, seed=index, magnitude=magnitude)
        tensors |= made | {f"{name}.dora_scale": random(30, 1)}
        norms[name] = float(matrix.square().sum())
    source = save({**tensors, **CARRIED}, tmp_path)
    for values in ({"new_rank": 3}, {"bits": 8}):
        report = compress_file(source, tmp_path / "out.safetensors", settings(**values, layer_threshold=0.01))
        loaded = load_lora(tmp_path / "out.safetensors")
        kept = {name for name, norm in norms.items() if norm >= 0.01 * sum(norms.values())}
        assert loaded.updates.keys() == kept
        assert len(kept) == 2
        assert loaded.others.keys() == {*CARRIED, *(f"{name}.dora_scale" for name in kept)}
        assert {module.name for module in report.modules if module.rank[1] == 0} == norms.keys() - kept


def test_a_file_keeps_the_layer_by_which_programs_know_it(tmp_path: Path) -> None:
    """InvokeAI knows an SD1.5 file by an attn2 to_k or to_v: the strongest of them stays, however weak."""
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    tensors: dict[str, torch.Tensor] = {}
    magnitudes = {"attn1_to_q": 1.0, "attn2_to_k": 1e-3, "attn2_to_v": 2e-3, "ff_net_2": 1.0}
    for index, (layer, magnitude) in enumerate(magnitudes.items()):
        inputs = 768 if layer.startswith("attn2") else 320
        tensors |= sample("kohya", f"{block}_{layer}", 320, inputs, 4, seed=index, magnitude=magnitude)[0]
    source = save(tensors, tmp_path)
    for values in (
        {"new_rank": 2, "layer_threshold": 0.01},
        {"bits": 8, "layer_threshold": 0.01},
        {"bits": 8, "target_error": 0.1},
        {"target_error": 0.3},
        {"strategy": "entropy", "target_error": 0.3},
        {"strategy": "mixed", "target_error": 0.3},
        {"strategy": "entropy", "bits": 2, "layer_threshold": 0.01},
    ):
        compress_file(source, tmp_path / "out.safetensors", settings(**values))
        kept = {name.removeprefix(f"{block}_") for name in load_lora(tmp_path / "out.safetensors").updates}
        assert {"attn1_to_q", "attn2_to_v", "ff_net_2"} <= kept, values
