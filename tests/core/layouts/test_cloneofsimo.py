"""cloneofsimo/lora: modules by number. Written files are read here as lora_diffusion reads them, by their own rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core.layouts.files import assert_close, dense, product, random, save
from safetensors import safe_open
from torch import Tensor

from lora_compress import CompressionSettings, FormatError, SettingsError, load_lora, open_lora
from lora_compress.engine.to_file import compress_file
from lora_compress.engine.unpack import expand_file
from lora_compress.inspection.comparison import compare_files
from lora_compress.programs.check import check_file

SD1 = [(320, 320)] * 4 + [(2560, 320)] + [(320, 320), (320, 768), (320, 768), (320, 320)]  # of one transformer block
BLOCKS = [320, 320, 640, 640, 1280, 1280, *[1280] * 3, *[640] * 3, *[320] * 3, 1280]
REAL = {
    "cloneofsimo_analog_svd_rank4.safetensors": ("sd1", 192),
    "cloneofsimo_lora_disney.safetensors": ("sd1", 192),
    "cloneofsimo_lora_pop.pt": ("sd2", 128),
    "cloneofsimo_lora_kiriko2.text_encoder.pt": ("sd1", 48),
}


def by_number(path: Path) -> tuple[dict[tuple[str, int], Tensor], dict[str, Tensor]]:
    """Updates by model and number, and embeddings, as a reader that counts modules finds them.

    It makes room for as many modules as there are pairs, takes each rank from the metadata, and has to find every place filled.
    """
    updates, embeddings = {}, {}
    with safe_open(path, "pt") as file:
        about = file.metadata()
        models: dict[str, list[str]] = {}
        for key in file.keys():  # noqa: SIM118 - no mapping
            models.setdefault(key.split(":")[0], []).append(key)
        for model, keys in models.items():
            if about[model] == "<embed>":
                embeddings[model] = file.get_tensor(model)
                continue
            assert isinstance(json.loads(about[model]), list)
            for number in range(len(keys) // 2):
                up, down = (file.get_tensor(f"{model}:{number}:{side}") for side in ("up", "down"))
                assert int(about[f"{model}:{number}:rank"]) == up.shape[1] == down.shape[0]
                updates[model, number] = product(up, down)
    return updates, embeddings


def sd1_unet(rank: int = 2) -> list[Tensor]:
    """up, down, up, down ... of all linear layers in attention and GEGLU of SD1's U-Net, narrow in all but the sizes that count."""
    tensors = []
    for width in BLOCKS:
        for outputs, inputs in SD1:
            sizes = (outputs // 320 * width, inputs if inputs == 768 else width)
            tensors += [torch.zeros(sizes[0], rank), torch.zeros(rank, sizes[1])]
    return tensors


@pytest.mark.parametrize(
    ("name", "values"),
    [(name, {"rank_ratio": 0.3} if "svd" in name else {"target_error": 0.4}) for name in REAL]
    + [("cloneofsimo_lora_pop.pt", {"layer_threshold": 0.02})],
    ids=str,
)
def test_a_real_file_keeps_every_number(
    name: str, values: dict[str, float], real_lora: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = real_lora(name), tmp_path / "out.safetensors"
    family, count = REAL[name]
    with open_lora(source) as lora:
        assert (lora.layout, lora.family, len(lora)) == ("cloneofsimo", family, count)
        expected = {lora.plain_keys(module).down: dense(lora[module]) for module in lora}
    report = compress_file(source, out, CompressionSettings.parse({**values, "allow_larger": True}), save_dtype=torch.float32)
    updates, embeddings = by_number(out)
    assert len(updates) == count
    lost = sum(float((updates[m, n] - expected[f"{m}:{n}:down"]).square().sum()) for m, n in updates)
    whole = sum(float(matrix.square().sum()) for matrix in expected.values())
    assert (lost / whole) ** 0.5 == pytest.approx(report.relative_error, rel=1e-3, abs=1e-6)
    if source.suffix == ".safetensors":
        before, kept = by_number(source)
        assert kept.keys() == embeddings.keys() and all(torch.equal(kept[token], embeddings[token]) for token in kept)
        for place, matrix in before.items():
            assert_close(matrix, expected[f"{place[0]}:{place[1]}:down"], 1e-6)


def test_numbers_have_names_where_sizes_tell_the_model(tmp_path: Path) -> None:
    torch.save([*sd1_unet()], tmp_path / "lora.pt")
    with open_lora(tmp_path / "lora.pt") as source:
        names = {source.plain_keys(name).down: name for name in source}
        assert json.loads(source.metadata["unet"]) == ["CrossAttention", "Attention", "GEGLU"]
    assert source.family == "sd1" and {source.part(name) for name in source} == {"U-Net"}
    assert names["unet:0:down"] == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert names["unet:4:down"] == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"
    assert names["unet:15:down"] == "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k"
    assert names["unet:54:down"] == "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert names["unet:143:down"] == "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"


def small(count: int = 12, rank: int = 4) -> dict[str, Tensor]:
    """Modules of no model that is known; every third is zero."""
    tensors = {}
    for number in range(count):
        tensors[f"unet:{number}:up"] = random(20, rank, seed=number) * (number % 3 != 2)
        tensors[f"unet:{number}:down"] = random(rank, 24, seed=number + 50)
    return tensors


def small_file(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    return save(tensors or small(), folder, {"unet": '["Attention"]', **{f"unet:{n}:rank": "4" for n in range(12)}})


def test_unknown_models_keep_numbers_as_names(tmp_path: Path) -> None:
    source, out = small_file(tmp_path), tmp_path / "out.safetensors"
    with open_lora(source) as lora:
        assert set(lora) == {f"unet:{n}" for n in range(12)} and lora.part("unet:3") == "U-Net"
    compress_file(
        source,
        out,
        CompressionSettings.parse({"new_rank": 2, "layer_threshold": 0.09, "allow_larger": True}),
        save_dtype=torch.float32,
    )
    updates, _ = by_number(out)
    assert len(updates) == 12 and all(int(torch.linalg.matrix_rank(matrix)) <= 2 for matrix in updates.values())
    assert sum(bool((matrix == 0).all()) for matrix in updates.values()) == 4


def test_what_would_lose_its_place_is_refused(tmp_path: Path) -> None:
    """A packed file leaves out modules that are zero."""
    settings = CompressionSettings.parse({"target_error": 0.1, "strategy": "entropy", "save_format": "packed"})
    with pytest.raises(SettingsError, match=r"unet:\d+ is zero .*known by their numbers: use save_format=kohya"):
        compress_file(small_file(tmp_path), tmp_path / "out.safetensors", settings)
    gap = {key: tensor for key, tensor in small().items() if not key.startswith("unet:5:")}
    with pytest.raises(FormatError, match=r"unet:5:down: is missing among modules that are known by their numbers"):
        open_lora(small_file(tmp_path, gap))
    assert len(open_lora(small_file(tmp_path, gap), repair=True)) == 11


def test_programs_of_today_get_names(real_lora: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = real_lora("cloneofsimo_lora_pop.pt"), tmp_path / "out.safetensors"
    assert not any(verdict.opens for verdict in check_file(source, ["all"]))
    compress_file(source, out, CompressionSettings.parse({"new_rank": 3}), save_dtype=torch.float32, consumers=["all"])
    assert all(verdict.opens for verdict in check_file(out, ["all"]))
    assert compare_files(str(source), str(out)).missing == ((), ())
    packed = CompressionSettings.parse({"target_error": 0.1, "strategy": "entropy", "save_format": "packed"})
    compress_file(source, out, packed)
    expand_file(out, out, force=True, save_dtype=torch.float32)
    assert compare_files(str(source), str(out)).relative_error <= 0.1
    assert not any(":" in key for key in load_lora(out).metadata)


@pytest.mark.parametrize(
    "tensors",
    [
        [random(4, 2), random(2, 4), random(4, 2)],
        [random(4, 2), random(3, 4)],
        [random(4, 2).long(), random(2, 4)],
        [random(4), random(4)],
        [torch.tensor(1.0), torch.tensor(2.0)],
    ],
    ids=["odd", "ranks", "integers", "vectors", "numbers"],
)
def test_other_lists_are_refused(tensors: list[Tensor], tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "lora.pt")
    with pytest.raises(FormatError, match=r"lora\.pt: holds a list of \d \(Tensor\), no list of pairs .*it is no LoRA"):
        open_lora(tmp_path / "lora.pt")
