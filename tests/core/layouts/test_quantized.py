"""Factors that another program quantized: multiplied by a scale that is known, refused by name otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from core.layouts.files import PAIRS, assert_close, dense, product, random, save
from torch import Tensor

from lora_compress import CompressionSettings, FormatError, load_lora, open_lora
from lora_compress.engine.to_file import compress_file

DOWN, UP = random(4, 6), random(5, 4, seed=1)
PLACES = ("{key}.scale", "{key}_scale", "{key}.scale_weight", "{key}.weight_scale", "{stem}.scale_weight", "{stem}.scale")


def as_int8(factor: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """round(factor / scale) and the scale, of each row or of all."""
    largest = factor.abs().flatten(1).amax(dim=1, keepdim=True) if rows else factor.abs().amax()
    scale = largest / 127
    return (factor / scale).round().to(torch.int8), scale


def comfy(**about: object) -> Tensor:
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def quantized(place: str, rows: bool, style: str = "kohya") -> tuple[dict[str, Tensor], Tensor]:
    """A pair in int8 with its scales at a place, and the update that it stands for."""
    _, down, up = PAIRS[style]
    tensors, exact = {}, {}
    for ending, factor in ((down, DOWN), (up, UP)):
        key = f"lora_unet_x{ending}"
        codes, scale = as_int8(factor, rows)
        tensors |= {key: codes, place.format(key=key, stem=key.removesuffix(".weight")): scale}
        exact[ending] = codes.double() * scale.double()
    return tensors, product(exact[up], exact[down])


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("style", ["kohya", "peft", "diffusers"])
def test_int8_is_multiplied_by_its_scale(place: str, rows: bool, style: str, tmp_path: Path) -> None:
    tensors, expected = quantized(place, rows, style)
    path = save(tensors, tmp_path)
    with open_lora(path) as source:
        assert_close(dense(source["lora_unet_x"]), expected, 1e-6)
        assert source.dtype == torch.float16 and not source.others and "multiplied by their scales" in source.notes[0]
        stored = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        assert source.factor_bytes("lora_unet_x") == stored and source.carried_bytes == 0


def test_a_compressed_file_is_plain_and_as_strong(tmp_path: Path) -> None:
    tensors, expected = quantized("{key}.scale", True)
    path, out = save(tensors, tmp_path), tmp_path / "out.safetensors"
    report = compress_file(path, out, CompressionSettings.parse({"new_rank": 4, "allow_larger": True}), save_dtype=torch.float32)
    assert report.status == "written"
    written = load_lora(out)
    assert not written.others
    assert_close(dense(written.updates["lora_unet_x"]), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_of_comfyui_is_multiplied_by_its_scale(dtype: torch.dtype, tmp_path: Path) -> None:
    down, up = (DOWN * 50).to(dtype), UP.to(dtype)
    tensors = {"x.lora_down.weight": down, "x.lora_up.weight": up, "x.lora_down.scale_weight": torch.tensor(0.02)}
    tensors |= {"x.lora_up.weight_scale": torch.full((5, 1), 2.0), "x.lora_up.input_scale": torch.ones(())}
    tensors |= {"x.lora_up.comfy_quant": comfy(format="float8_e4m3fn"), "scaled_fp8": torch.zeros(2).to(dtype)}
    source = open_lora(save(tensors, tmp_path))
    expected = product(up.double() * 2.0, down.double() * float(torch.tensor(0.02)))
    assert_close(dense(source["x"]), expected, 1e-6)
    assert source.dtype == dtype and not source.others


def test_fp8_without_a_scale_is_a_precision(tmp_path: Path) -> None:
    down, up = DOWN.to(torch.float8_e4m3fn), UP.to(torch.float8_e4m3fn)
    source = open_lora(save({"x.lora_down.weight": down, "x.lora_up.weight": up}, tmp_path))
    assert_close(dense(source["x"]), product(up, down), 1e-12)


def test_other_layouts_are_dequantized_as_well(tmp_path: Path) -> None:
    codes, scale = as_int8(random(6, 5), True)
    bias = random(6)
    path = save({"x.diff": codes, "x.diff_scale": scale, "x.diff_b": bias}, tmp_path)
    assert_close(dense(open_lora(path)["x"]), codes.double() * scale.double(), 1e-5)


CODES = as_int8(DOWN, False)[0]
UNKNOWN: dict[str, dict[str, Tensor]] = {
    "nvfp4": {"weight.nvfp4_scale": torch.ones(())},
    "blocks": {"weight_scale": torch.ones(4, 2)},
    "columns alone": {"weight_scale": torch.ones(6)},
    "codes as a scale": {"weight_scale": torch.ones(4, 1).byte()},
    "two scales": {"weight_scale": torch.ones(()), "scale_weight": torch.ones(())},
    "a second scale": {"weight_scale": torch.ones(()), "weight_scale_2": torch.ones(())},
    "a zero point": {"weight_scale": torch.ones(()), "weight_zero_point": torch.zeros(())},
    "bitsandbytes": {"weight.absmax": torch.ones(4), "weight.quant_map": torch.ones(16)},
    "bitsandbytes int8": {"weight.SCB": torch.ones(4)},
    "a rotation": {"weight_scale": torch.ones(()), "comfy_quant": comfy(format="int8_tensorwise", convrot=True)},
    "an unknown format": {"weight_scale": torch.ones(()), "comfy_quant": comfy(format="nvfp4")},
    "no format": {"weight_scale": torch.ones(()), "comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)},
}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_refused_by_name(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    beside = {f"x.lora_down.{key}": tensor for key, tensor in UNKNOWN[name].items()}
    path = save({"x.lora_down.weight": CODES.to(dtype), "x.lora_up.weight": UP, **beside}, tmp_path)
    with pytest.raises(FormatError) as refused:
        open_lora(path)
    assert any(f": {key}: " in str(refused.value) for key in beside) and "allowed: " in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int64, torch.bool])
def test_integers_without_a_scale_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    path = save({"x.lora_down.weight": CODES.to(dtype), "x.lora_up.weight": UP}, tmp_path)
    with pytest.raises(FormatError, match=r"x\.lora_down\.weight: is .*allowed: a floating-point matrix, or int8 with its scale"):
        open_lora(path)


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = save({"x.lora_down.weight": CODES, "x.lora_up.weight": UP, "x.lora_down.scale": torch.tensor(float("nan"))}, tmp_path)
    with pytest.raises(FormatError, match=r"x\.lora_down\.scale holds NaN"):
        open_lora(path)["x"]


def test_what_is_no_factor_is_carried_through_as_it_is(tmp_path: Path) -> None:
    base = {"x.base_layer.weight": CODES, "x.base_layer.weight_scale": torch.ones(())}
    tensors = {"y.lora_down.weight": DOWN, "y.lora_up.weight": UP, **base}
    with open_lora(save(tensors, tmp_path)) as source:
        assert source.others.keys() == base.keys() and torch.equal(source.others["x.base_layer.weight"], CODES)
