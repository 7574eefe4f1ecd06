"""Layouts that store an update as two factors and differ in their keys alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.tensors import TensorFile
from ..update import LowRankUpdate
from .plain import KOHYA_KEYS, PlainKeys
from .survey import LARGEST_CONVERSION, Module, ModuleShape, Survey

__all__ = ["PairStyle", "find_pairs"]

Scale = Callable[[str, int], float | None]


@dataclass(frozen=True)
class PairStyle:
    """Key endings of a pair: `<name><down>` is (r, in, *kernel), `<name><up>` is (out, r).

    Args:
        layout: name of the layout.
        down, up: key endings.
        mid: ending of the middle factor (m, r, *kernel) of a CP-decomposed convolution, where the layout has one.
        alphas: endings under which alpha may stand.
        own: the part of both endings that tells two updates of one module apart, and so belongs to the name.
        keeps_alpha: plain files of this layout hold alpha; otherwise the scale goes into the factors.
    """

    layout: str
    down: str
    up: str
    mid: str = ""
    alphas: tuple[str, ...] = (".alpha",)
    own: str = ""
    keeps_alpha: bool = False


@dataclass(frozen=True)
class _Plan:
    """How the tensors of one pair become an update: `rank` is what is kept of up, `inner` of down (they differ with a mid)."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    rank: int
    inner: int


def find_pairs(survey: Survey, style: PairStyle, scale_of: Scale | None = None, names: re.Pattern[str] = re.compile("")) -> None:
    """Add the pairs of a style, those of modules whose names match.

    `scale_of(name, rank)` is asked where the file has no alpha; its answer None means 1.
    """
    for name in [*filter(names.search, survey.names(style.down))]:
        _add_pair(survey, style, name, scale_of)
    for name in [*filter(names.search, survey.names(style.up))]:  # the rest has no down
        survey.refuse(name + style.up, f"has no {style.down.lstrip('.')} beside it", "both factors", "the module is left out")
        survey.drop(name, [name + style.up])


def _add_pair(survey: Survey, style: PairStyle, name: str, scale_of: Scale | None) -> None:
    down, up, mid = name + style.down, name + style.up, name + style.mid if style.mid else ""
    mid = mid if mid in survey.file else ""
    keys = [down, up, mid] if mid else [down, up]
    if not survey.usable(name, *keys):
        return
    plan = _plan_pair(survey, down, up, mid)
    if plan is None:
        survey.drop(name, keys)
        return
    alphas = [name + ending for ending in style.alphas]
    alpha, scale = survey.alpha(*alphas), survey.scale(name)
    if scale is None and alpha is None and scale_of:
        scale = scale_of(name, plan.rank)
    if scale is None and alpha is None:
        scale = survey.stated_scale(name, plan.rank)
    if scale is not None or alpha is None:
        alpha = (1.0 if scale is None else scale) * plan.rank
    else:
        alpha *= plan.rank / survey.file[down].shape[0]  # the rank that programs divide alpha by
    if mid:
        survey.tell("lora_mid was merged into lora_down, which changes nothing in the update", name)
    shape = ModuleShape(plan.outputs, plan.inputs, plan.kernel, plan.rank)
    load = _loader(survey.file, down, up, mid, plan, alpha)
    plain = KOHYA_KEYS if style.keeps_alpha else PlainKeys.of(name + style.own, keys[:2])
    used = (*keys, *survey.taken(*alphas, name + ".scale"))
    gain = 1.0 if style.keeps_alpha else alpha / plan.rank
    survey.add(Module(name + style.own, style.layout, shape, used, load, plain, bias_gain=gain))


def _plan_pair(survey: Survey, down_key: str, up_key: str, mid_key: str) -> _Plan | None:
    down, up = survey.file[down_key].shape, survey.file[up_key].shape
    if any(size != 1 for size in up[2:]):
        survey.refuse(up_key, f"has the shape {up}", "a 1x1 kernel, (out, rank, 1, ...)", "the module is left out")
        return None
    kernel = down[2:] or (1,) * (len(up) - 2)
    rank = inner = down[0]
    if mid_key:
        mid = survey.file[mid_key].shape
        if any(size != 1 for size in down[2:]) or math.prod(mid) // mid[1] * down[1] > LARGEST_CONVERSION:
            survey.refuse(mid_key, f"has the shape {mid} with a lora_down of {down}", "a 1x1 lora_down", "the module is left out")
            return None
        if mid[1] != down[0]:
            fix = f"both are cut to rank {min(mid[1], down[0])}"
            survey.refuse(mid_key, f"has the shape {mid}", f"rank {down[0]} second, as in {down_key}", fix)
        kernel, rank, inner = mid[2:] or down[2:], mid[0], min(mid[1], down[0])
    if up[1] != rank:
        fix = f"both are cut to rank {min(rank, up[1])}"
        survey.refuse(up_key, f"has the shape {up}", f"rank {rank} second, as in {mid_key or down_key} {down}", fix)
    return _Plan(up[0], down[1], kernel, min(rank, up[1]), inner if mid_key else min(inner, up[1]))


def _loader(file: TensorFile, down_key: str, up_key: str, mid_key: str, plan: _Plan, alpha: float) -> Callable[[], LowRankUpdate]:
    def load() -> LowRankUpdate:
        down, up = file.read(down_key), file.read(up_key)
        if (len(down), up.shape[1]) != (plan.inner, plan.rank):
            down, up = down[: plan.inner], up[:, : plan.rank]
        if mid_key:
            mid = file.read(mid_key)[: plan.rank, : plan.inner].reshape(plan.rank, plan.inner, -1)
            # down'[m, i, k] = sum_n mid[m, n, k] down[n, i]; float32 at least, since the product of two fp16 numbers is none
            wide = _wide(mid, down)
            down = torch.einsum("mnk,ni->mik", mid.to(wide), down.flatten(1).to(wide))
        down = down.reshape(plan.rank, plan.inputs, *plan.kernel)
        return LowRankUpdate(down, up.reshape(plan.outputs, plan.rank, *([1] * len(plan.kernel))), alpha)

    return load


def _wide(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, float32 otherwise: torch promotes no fp8."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
