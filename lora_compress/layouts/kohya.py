"""kohya's layout: `<module>.lora_down.weight`, `<module>.lora_up.weight` and `<module>.alpha`, as sd-scripts writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import FormatError
from ..update import LowRankUpdate
from .pairs import PairStyle, find_pairs
from .survey import Layout, Survey

__all__ = ["FP8", "KOHYA", "as_kohya", "from_kohya", "to_kohya"]

FP8 = torch.float8_e4m3fn
_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_FP8_AMAX = 8.0  # e4m3 is as exact anywhere from 1 to 128; 8 keeps products of factors finite in fp16
_STYLE = PairStyle("kohya", _DOWN, _UP, mid=".lora_mid.weight", keeps_alpha=True)


def _find(survey: Survey) -> None:
    find_pairs(survey, _STYLE)


KOHYA = Layout("kohya", _find)


def from_kohya(tensors: Mapping[str, Tensor]) -> tuple[dict[str, LowRankUpdate], dict[str, Tensor]]:
    """Part tensors into updates by module name and whatever belongs to none. A missing or zero alpha means alpha = rank.

    Raises:
        FormatError: a module has only one of its two factors, factors that do not fit, or parts that change what they mean
            (lora_mid, dora_scale).
    """
    names = [key[: -len(_DOWN)] for key in tensors if key.endswith(_DOWN)]
    rest = dict(tensors)
    updates = {}
    for name in names:
        down, up, alpha = rest.pop(name + _DOWN), rest.pop(name + _UP, None), rest.pop(name + _ALPHA, None)
        if up is None:
            raise FormatError(f"{name}: has lora_down.weight but no lora_up.weight")
        if alpha is not None and alpha.numel() != 1:
            raise FormatError(f"{name}: alpha has the shape {tuple(alpha.shape)}, it is a single number")
        value = float(alpha) if alpha is not None else 0.0
        try:
            updates[name] = LowRankUpdate(down, up, value or float(down.shape[0]))
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None
    for key in rest:
        if key.endswith(_UP):
            raise FormatError(f"{key[: -len(_UP)]}: has lora_up.weight but no lora_down.weight")
        if key.partition(".")[0] in updates:
            raise FormatError(f"{key}: a part of a module that is not read here: plain LoRA and LoCon modules are, DoRA is not")
    return updates, rest


def as_kohya(updates: Mapping[str, LowRankUpdate]) -> dict[str, Tensor]:
    """Tensors that hold the very factors and alphas of `updates`, for a host that reads alpha module by module."""
    tensors = {}
    for name, update in updates.items():
        tensors[name + _DOWN] = update.down
        tensors[name + _UP] = update.up
        tensors[name + _ALPHA] = torch.tensor(update.alpha, dtype=torch.float32)
    return tensors


def to_kohya(updates: Mapping[str, LowRankUpdate], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors that every consumer loads right: one float32 alpha for the whole file, ranks of 2 at least.

    The scale of a module goes into its factors, half into each, because diffusers mixes up alphas that differ between
    modules; stable-diffusion.cpp misreads rank 1, so a zero component is added to it. alpha is 1, and for fp8 the power
    of two that brings the largest weight of the file between 4 and 16 (values stretched further overflow fp16 products).

    Args:
        updates: by module name; rank 0 is left out.
        dtype: of the factors; `FP8` for float8_e4m3fn.

    Raises:
        FormatError: weights beyond the range of `dtype`.
    """
    kept = {name: _at_least_rank_two(update) for name, update in updates.items() if update.rank}
    alpha = _fp8_alpha(kept) if dtype == FP8 else 1.0
    tensors = {}
    for name, update in kept.items():
        gain = update.alpha / alpha
        down = update.down.float() * math.sqrt(abs(gain))
        up = update.up.float() * math.copysign(math.sqrt(abs(gain)), gain)
        balance = _power_of_two_balance(down, up)
        for key, factor in ((name + _DOWN, down * balance), (name + _UP, up / balance)):
            tensors[key] = factor.to(dtype).contiguous().cpu()
            if not torch.isfinite(tensors[key].float()).all():
                raise FormatError(f"{key}: weights up to {float(factor.abs().amax()):.3g} do not fit {dtype}: save as float32")
        tensors[name + _ALPHA] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def _at_least_rank_two(update: LowRankUpdate) -> LowRankUpdate:
    if update.rank != 1:
        return update
    down = torch.cat([update.down, torch.zeros_like(update.down)], dim=0)
    up = torch.cat([update.up, torch.zeros_like(update.up)], dim=1)
    return LowRankUpdate(down, up, 2.0 * update.alpha)


def _fp8_alpha(updates: Mapping[str, LowRankUpdate]) -> float:
    """The smallest power of two with sqrt(max|down| max|up| |alpha_m| / alpha) at most 8 for every module m."""
    products = [float(u.down.double().abs().amax() * u.up.double().abs().amax()) * abs(u.alpha) for u in updates.values()]
    largest = max(products, default=0.0)
    if largest == 0.0:
        return 1.0
    return 2.0 ** min(max(math.ceil(math.log2(largest / _FP8_AMAX**2)), -126), 127)  # alpha is stored in float32


def _power_of_two_balance(down: Tensor, up: Tensor) -> float:
    """c = 2^k for which max|down c| and max|up / c| are closest; a power of two costs no precision."""
    largest_down, largest_up = float(down.abs().amax()), float(up.abs().amax())
    if largest_down == 0.0 or largest_up == 0.0:
        return 1.0
    return 2.0 ** round(0.5 * math.log2(largest_up / largest_down))
