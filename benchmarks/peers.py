"""What else could be done with a LoRA: truncation with each usual format of numbers, LoRAQuant's scheme, and Shannon's bound.

All take the exact singular value decomposition in the balanced basis, and ranks are chosen over the whole file by squared error
per byte, which is more than the tools in use do. Bytes are those of weights and scales; headers are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_compress import LowRankUpdate, thin_svd
from lora_compress.update import difference

__all__ = ["FORMATS", "Component", "Module", "Point", "decomposed", "loraquant", "shannon", "truncated"]

Point = tuple[float, float]  # bytes, relative error
_GROUP = 64
_SCALE_BITS = 16
_LORAQUANT_GROUP = 128
_STEPS = 40  # points of a curve
# The 16 levels of NF4: arXiv 2305.14314, appendix E.
_NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)


@dataclass(frozen=True)
class Module:
    """One module: sigma (k,), rows sqrt(sigma_i) v_i of down (k, n) and sqrt(sigma_i) u_i of up (k, m), strongest first."""

    sigma: Tensor
    down: Tensor
    up: Tensor

    @property
    def width(self) -> int:
        """Weights of a component."""
        return self.down.shape[1] + self.up.shape[1]


@dataclass(frozen=True)
class Component:
    """Where a component is, and what it is worth: its squared singular value per weight."""

    worth: float
    module: str
    index: int


def decomposed(updates: Mapping[str, LowRankUpdate]) -> dict[str, Module]:
    """The modules of a LoRA as their components."""
    modules = {}
    for name, update in updates.items():
        spectrum = thin_svd(update)
        modules[name] = Module(spectrum.sigma, *spectrum.balanced(len(spectrum.sigma)))
    return modules


def _fp16(rows: Tensor) -> Tensor:
    return rows.half().float()


def _int8(rows: Tensor) -> Tensor:
    """Symmetric, the scale of a group from its largest weight."""
    groups, width = _grouped(rows, _GROUP)
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 127).half().float().clamp_min(1e-30)
    return (groups / scale).round().clamp(-127, 127).mul(scale).flatten(1)[:, :width]


def _nf4(rows: Tensor) -> Tensor:
    """bitsandbytes' NF4: the nearest of 16 levels times the largest weight of a group."""
    groups, width = _grouped(rows, _GROUP)
    scale = groups.abs().amax(dim=-1, keepdim=True).half().float().clamp_min(1e-30)
    codes = torch.bucketize(groups / scale, (_NF4[1:] + _NF4[:-1]) / 2)
    return _NF4[codes].mul(scale).flatten(1)[:, :width]


@dataclass(frozen=True)
class Format:
    """How the numbers of a truncated LoRA are stored."""

    round: Callable[[Tensor], Tensor]
    bits: float  # of a weight
    grouped: bool

    def bytes(self, module: Module) -> float:
        """Of one component."""
        groups = sum(-(-rows.shape[1] // _GROUP) for rows in (module.down, module.up)) if self.grouped else 0
        return (module.width * self.bits + groups * _SCALE_BITS) / 8


FORMATS = {"fp16": Format(_fp16, 16, False), "int8": Format(_int8, 8, True), "nf4": Format(_nf4, 4, True)}


def truncated(modules: Mapping[str, Module], form: Format) -> list[Point]:
    """Bytes and error of the best k components in a format, for k from few to all."""
    ranked = sorted(
        (Component(float(s) ** 2 / module.width, name, i) for name, module in modules.items() for i, s in enumerate(module.sigma)),
        key=lambda component: -component.worth,
    )
    coded = {name: (form.round(module.down), form.round(module.up)) for name, module in modules.items()}
    norm = _norm(modules)
    points = []
    for k in _counts(len(ranked)):
        ranks = dict.fromkeys(modules, 0)
        for component in ranked[:k]:
            ranks[component.module] += 1
        lost = sum(_error(modules[name], *(rows[:rank] for rows in coded[name])) for name, rank in ranks.items())
        points.append((sum(rank * form.bytes(modules[name]) for name, rank in ranks.items()), math.sqrt(lost / norm)))
    return points


def loraquant(modules: Mapping[str, Module], bits: int, share: float) -> Point:
    """LoRAQuant (arXiv 2510.26690): the components that hold `share` of the squared norm in `bits`, the others by their signs.

    Groups of 128 along each row of the balanced basis: `bits` with least and largest value, signs with the mean magnitude. The
    16-bit scales and the zero points, which its own count of bits leaves out, are counted. Instead of its gradient steps on the
    ranges of the groups, each range is the best of nine.
    """
    size, lost = 0.0, 0.0
    for module in modules.values():
        squares = module.sigma.square()
        high = int((squares.cumsum(0) < share * squares.sum()).sum()) + 1
        coded = []
        for rows in (module.down, module.up):
            coded.append(torch.cat([_min_max(rows[:high], bits), _signs(rows[high:])]))
            groups = -(-rows.shape[1] // _LORAQUANT_GROUP)
            weights = rows.shape[1] * (high * bits + (len(rows) - high))
            size += (weights + groups * (high * (_SCALE_BITS + bits) + (len(rows) - high) * _SCALE_BITS)) / 8
        lost += _error(module, *coded)
    return size, math.sqrt(lost / _norm(modules))


def shannon(modules: Mapping[str, Module]) -> list[Point]:
    """The least bytes in which Gaussian factors of these widths and sigma can be told at an error: reverse water-filling.

    A row of n Gaussian numbers with relative distortion d takes n / 2 log2(1 / d) bits, and a component whose two rows have
    d_v and d_u loses sigma^2 (d_v + d_u - d_v d_u). Both are chosen for the least error + slope * bits, or neither is told.
    """
    sigma = torch.cat([module.sigma.double() for module in modules.values()])
    widths = torch.cat(
        [torch.tensor([[m.down.shape[1], m.up.shape[1]]], dtype=torch.float64).repeat(len(m.sigma), 1) for m in modules.values()]
    )
    squares = sigma.square()
    points = []
    for exponent in torch.linspace(-28, 0, 141).tolist():
        slope = float(squares.max()) * 2.0**exponent / float(widths.mean())
        wanted = slope * widths / squares.clamp_min(1e-300).unsqueeze(1)  # d_v, d_u if the other were 0
        d = wanted.clamp_max(1.0)
        for _ in range(60):
            d = (wanted / (1 - d.flip(1)).clamp_min(1e-9)).clamp_max(1.0)
        bits = -0.5 * widths * d.log2()
        error = squares * (d.sum(1) - d.prod(1))
        keep = error + 2 * math.log(2) * slope * bits.sum(1) < squares
        lost = float(torch.where(keep, error, squares).sum() / squares.sum())
        points.append((float(bits.sum(1)[keep].sum()) / 8, math.sqrt(lost)))
    return points[::-1]


def _min_max(rows: Tensor, bits: int) -> Tensor:
    """2^bits even levels between the least and the largest of a group, or between narrower ends where that is better."""
    groups, width = _grouped(rows, _LORAQUANT_GROUP)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    found = torch.zeros_like(groups)
    for share in torch.linspace(1.0, 0.4, 9).tolist():
        scale = ((high - low) * share / (2**bits - 1)).half().float().clamp_min(1e-30)
        zero = (-low * share / scale).round()
        values = ((groups / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale
        error = (values - groups).square().sum(dim=-1, keepdim=True)
        found = torch.where(error < best, values, found)
        best = torch.minimum(best, error)
    return found.flatten(1)[:, :width]


def _signs(rows: Tensor) -> Tensor:
    groups, width = _grouped(rows, _LORAQUANT_GROUP)
    return groups.sign().mul(groups.abs().mean(dim=-1, keepdim=True).half().float()).flatten(1)[:, :width]


def _grouped(rows: Tensor, size: int) -> tuple[Tensor, int]:
    """Rows in groups, (k, groups, size); the last one is filled up with its row's last weight. And the width."""
    width = rows.shape[1]
    filled = torch.cat([rows, rows[:, -1:].expand(-1, -width % size)], dim=1)
    return filled.unflatten(1, (-1, size)), width


def _counts(most: int) -> list[int]:
    return sorted(
        {max(round(most ** (i / _STEPS)), 1) for i in range(_STEPS + 1)} | {round(most * i / _STEPS) or 1 for i in range(_STEPS)}
    )


def _error(module: Module, down: Tensor, up: Tensor) -> float:
    return difference(module.down, module.up, down, up)


def _norm(modules: Mapping[str, Module]) -> float:
    return float(sum(module.sigma.square().sum() for module in modules.values()))
