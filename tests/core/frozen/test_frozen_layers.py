"""Packed layers: decoded as bitsandbytes decodes them, equal to float layers of the decoded weight, safe from casts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import nn

from lora_compress import LoraCompressError
from lora_compress.frozen import WEIGHT_FORMATS, dequantized_weight, is_frozen, quantize_frozen, require_bitsandbytes, weight_bytes

LAYERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(96, 64),
    "no bias": lambda: nn.Linear(64, 96, bias=False),
    "convolution": lambda: nn.Conv2d(32, 48, 3, padding=1, stride=2),
    "grouped": lambda: nn.Conv2d(64, 48, 3, padding=(2, 1), dilation=(2, 1), groups=2),
}
# Relative errors of normal weights: int8 steps by absmax / 127, NF4 is 0.8 bit from Shannon's 2^-4, e4m3 has 3 bits of fraction.
ERRORS = {"int8": 0.01, "nf4": 0.1, "fp8": 0.03}


def packed(layer: nn.Module, name: str) -> tuple[Any, Any]:
    """The layer packed, and a float copy of what it decodes to."""
    model = nn.Sequential(layer)
    quantize_frozen(model, name)
    assert model[0] is layer and is_frozen(layer)
    with torch.device("meta"):
        float_copy = copy.deepcopy(layer)
    del float_copy.forward
    float_copy._buffers.clear()
    float_copy.weight = nn.Parameter(dequantized_weight(layer), requires_grad=False)
    return layer, float_copy


def input_of(layer: nn.Module) -> torch.Tensor:
    shape = (3, 7, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 9, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_output_and_gradient_are_those_of_the_decoded_weight(name: str, kind: str, autocast: bool) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    before = layer.weight.detach().clone()
    ours, theirs = packed(layer, name)
    assert float((theirs.weight - before).norm() / before.norm()) < ERRORS[ours.frozen_format]
    results = []
    for module in (ours, theirs):
        x = input_of(module).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad))
    assert results[0][0].dtype == results[1][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=2e-2 if autocast else 1e-5, atol=2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_decode_as_bitsandbytes_decodes_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 160).half()
    layer = nn.Linear(160, 48, bias=False).half()
    layer.weight.data.copy_(weight)
    quantize_frozen(nn.Sequential(layer), "int8")
    codes, absmax, _ = functional.int8_vectorwise_quant(weight)
    decoded = functional.int8_vectorwise_dequant(codes, absmax).to(dtype)
    torch.testing.assert_close(dequantized_weight(layer, dtype), decoded, rtol=1e-6, atol=0)

    layer = nn.Linear(160, 48, bias=False).half()
    layer.weight.data.copy_(weight)
    quantize_frozen(nn.Sequential(layer), "nf4")
    codes, state = functional.quantize_4bit(weight.to(dtype), blocksize=64, quant_type="nf4", compress_statistics=True)
    if dtype == torch.float16:  # bitsandbytes codes what it is given, and we always give it fp16
        assert torch.equal(dequantized_weight(layer, dtype), functional.dequantize_4bit(codes, state))
    assert dequantized_weight(layer, dtype).dtype == dtype


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_no_cast_changes_a_packed_weight_and_none_is_in_the_state(name: str) -> None:
    layer, _ = packed(nn.Linear(128, 64), name)
    before = dequantized_weight(layer)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float32):
        layer.to(dtype)
        assert layer.bias.dtype == dtype
        assert torch.equal(dequantized_weight(layer), before)
    assert list(layer.state_dict()) == ["bias"]
    assert all(not parameter.requires_grad for parameter in layer.parameters())
    assert torch.equal(dequantized_weight(copy.deepcopy(layer)), before)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_nothing_decoded_is_kept_for_backward(name: str, kind: str) -> None:
    """Autograd holds no tensor for the layer at all: not the decoded weight, nor the input, whose gradient does not need it."""
    layer, _ = packed(LAYERS[kind](), name)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda _: None):
        output = layer(input_of(layer).requires_grad_())
    assert not saved
    assert "layer" in vars(output.grad_fn)  # where an own function keeps what it does not save
    assert not any(isinstance(value, torch.Tensor) for value in vars(output.grad_fn).values())


def test_backward_reads_the_codes_of_its_own_time() -> None:
    """Block swapping moves codes away after forward and brings them back, in other memory, before backward."""
    layer, theirs = packed(nn.Linear(64, 96), "nf4")
    x = input_of(layer).requires_grad_()
    y = layer(x)
    elsewhere, here = layer.weight.data.clone(), layer.weight.data
    here.copy_(torch.randint_like(here, 256))  # another block's
    layer.weight.data = elsewhere
    y.sum().backward()
    torch.testing.assert_close(x.grad, theirs.weight.sum(0).expand_as(x))


def test_what_is_left_as_it_is() -> None:
    class Packed(nn.Linear):
        pass

    embedding, tied = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
    tied.weight = embedding.weight
    model = nn.ModuleDict(
        {
            "edge": nn.Conv2d(4, 64, 3),
            "reflected": nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
            "same": nn.Conv2d(64, 64, 3, padding="same"),
            "kept": nn.Linear(64, 64),
            "subclass": Packed(64, 64),
            "embedding": embedding,
            "tied": tied,
            "norm": nn.LayerNorm(64),
            "packed": nn.Linear(64, 64),
        }
    )
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    report = quantize_frozen(model, "int8", keep=lambda path: path == "kept")
    assert [name for name, module in model.items() if is_frozen(module)] == ["packed"]
    assert (report.layers, report.before, report.after) == (1, size, weight_bytes(model))
    assert quantize_frozen(model, "int8", keep=lambda path: path == "kept").layers == 0


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    layer = nn.Linear(64, 32)
    layer.weight.data[::2] = 0
    quantize_frozen(nn.Sequential(layer), name)
    weight = dequantized_weight(layer)
    assert weight.isfinite().all() and not weight[::2].any() and weight[1::2].any()


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5], ids=["nan", "inf", "beyond fp16"])
def test_a_weight_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    model[0].weight.data[3, 4] = value
    with pytest.raises(LoraCompressError, match=f"^0: its weight is not finite in fp16 and cannot be quantized to {name}"):
        quantize_frozen(model, name)
    assert not is_frozen(model[0])


def test_a_weight_that_is_packed_already_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 32).to(torch.float8_e4m3fn))
    with pytest.raises(LoraCompressError, match=r"^0: its weight is torch.float8_e4m3fn"):
        quantize_frozen(model, "int8")


@pytest.mark.parametrize(("version", "message"), [(None, "not installed: pip install"), ("0.44.1", "or newer, found 0.44.1")])
def test_bitsandbytes_missing_or_too_old(monkeypatch: pytest.MonkeyPatch, version: str | None, message: str) -> None:
    import importlib.metadata

    def find(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    with pytest.raises(LoraCompressError, match=message):
        require_bitsandbytes("base_quantize")
