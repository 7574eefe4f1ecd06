"""How one weight is packed and decoded: int8 and NF4 by bitsandbytes, fp8 by torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraCompressError

__all__ = ["WEIGHT_FORMATS", "WeightFormat", "require_bitsandbytes"]

_OLDEST_BITSANDBYTES = (0, 50)  # what is tested; on a CPU 0.46 decodes blocks of zeros in NF4 to other values
_FP8 = torch.float8_e4m3fn
_NF4_BLOCK = 64  # weights that share a scale, as in QLoRA
_DECODED_AT_ONCE = 1 << 20  # weights
_SCALE_BLOCK = 256  # NF4 scales that share a scale of their own: the only size that bitsandbytes' kernels know


@dataclass(frozen=True)
class WeightFormat:
    """A way to store a frozen weight.

    Args:
        pack: weight (out, in) in fp16 -> its codes and what decodes them; codes are integers, scales float32.
        unpack: codes and scales, shape, dtype -> the weight of that shape in `dtype`.
        bitsandbytes: whether it needs that library.
        convolutions: whether it stores kernels of convolutions, too; those go to int8 otherwise.
    """

    pack: Callable[[Tensor], tuple[Tensor, ...]]
    unpack: Callable[[tuple[Tensor, ...], torch.Size, torch.dtype], Tensor]
    bitsandbytes: bool
    convolutions: bool


def require_bitsandbytes(purpose: str) -> Any:
    """bitsandbytes.functional.

    Raises:
        LoraCompressError: it is not installed, too old, or cannot be loaded.
    """
    oldest = ".".join(map(str, _OLDEST_BITSANDBYTES))
    remedy = f'pip install "bitsandbytes>={oldest}"'
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise LoraCompressError(f"{purpose} needs bitsandbytes, which is not installed: {remedy}") from None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST_BITSANDBYTES:
        raise LoraCompressError(f"{purpose} needs bitsandbytes {oldest} or newer, found {version}: {remedy}")
    try:
        return importlib.import_module("bitsandbytes.functional")
    except (ImportError, OSError, RuntimeError) as error:
        raise LoraCompressError(f"{purpose}: bitsandbytes {version} cannot be loaded ({error}): {remedy}") from error


def _pack_int8(weight: Tensor) -> tuple[Tensor, ...]:
    """Codes round(127 w / absmax) by row, int8 (out, in), and absmax (out,): LLM.int8(), arXiv 2208.07339, without outliers."""
    codes, absmax, _ = _bitsandbytes().int8_vectorwise_quant(weight)
    return codes, absmax


def _unpack_int8(packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """codes absmax / 127: int8_vectorwise_dequant of bitsandbytes, which would hold two float32 copies on the way."""
    codes, absmax = packed
    return _scale_rows(codes, absmax / 127, dtype).view(shape)


def _pack_fp8(weight: Tensor) -> tuple[Tensor, ...]:
    """e4m3 codes of w / scale as bytes (out, in), and scale = absmax / 448 by row (out,)."""
    scale = weight.float().abs().amax(dim=1) / torch.finfo(_FP8).max
    codes = (weight / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).to(_FP8)
    return codes.view(torch.uint8), scale


def _unpack_fp8(packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    codes, scale = packed
    return _scale_rows(codes.view(_FP8).to(dtype), scale, dtype).view(shape)


def _pack_nf4(weight: Tensor) -> tuple[Tensor, ...]:
    """Two 4-bit codes a byte, absmax by block of 64 in 8 bits, its scale by 256 of those, their mean: QLoRA, arXiv 2305.14314."""
    functional = _bitsandbytes()
    codes, state = functional.quantize_4bit(weight, blocksize=_NF4_BLOCK, quant_type="nf4")
    mean = state.absmax.mean()
    # as its compress_statistics does, which would keep a table of the first device that it meets, be it meta
    absmax, scale = functional.quantize_blockwise(state.absmax - mean, code=_dynamic_map(codes.device), blocksize=_SCALE_BLOCK)
    return codes, absmax, scale.absmax, mean.view(1)


def _unpack_nf4(packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes()
    codes, absmax, scale, offset = packed
    absmax = functional.dequantize_blockwise(absmax, absmax=scale, code=_dynamic_map(codes.device), blocksize=_SCALE_BLOCK) + offset
    state = functional.QuantState(absmax=absmax, shape=shape, dtype=dtype, blocksize=_NF4_BLOCK, quant_type="nf4")
    return functional.dequantize_4bit(codes, state)


def _scale_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale by row, rounded once to `dtype`; a few rows at a time on a CPU, which multiplies float32 copies."""
    rows = codes.flatten(1)
    decoded = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    count = max(1, _DECODED_AT_ONCE // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    for part, factor, target in zip(rows.split(count), scale.split(count), decoded.split(count), strict=True):
        torch.mul(part, factor.unsqueeze(1), out=target)
    return decoded


@lru_cache
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 values that scales of NF4 are coded by; one copy for each device."""
    return _bitsandbytes().create_dynamic_map().to(device)


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.functional")


WEIGHT_FORMATS = {
    "int8": WeightFormat(_pack_int8, _unpack_int8, bitsandbytes=True, convolutions=True),
    "nf4": WeightFormat(_pack_nf4, _unpack_nf4, bitsandbytes=True, convolutions=False),
    "fp8": WeightFormat(_pack_fp8, _unpack_fp8, bitsandbytes=False, convolutions=True),
}
