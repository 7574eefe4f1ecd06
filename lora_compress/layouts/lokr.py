"""LyCORIS LoKr: dW = scale * kron(w1, w2), either of them whole or as a product, w2 also CP-decomposed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..files.tensors import TensorFile
from ..names.kernels import unflatten
from ..update import LowRankUpdate
from .loha import converted_to, cp_pair, lycoris_scale
from .peft_config import PeftConfig
from .reduce import Triple, balanced, kron_svd, svd_of_matrix, svd_of_pair
from .sketch import converted, largest_rank
from .survey import LARGEST_CONVERSION, LARGEST_RANK, Layout, Module, ModuleShape, Survey

__all__ = ["LOKR"]

_PARTS = (".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2")


@dataclass(frozen=True)
class _Half:
    """One side of the Kronecker product: its keys, its size as a matrix, an upper bound of its rank, its kernel, r of a product."""

    keys: tuple[str, ...]
    rows: int
    columns: int
    rank: int
    kernel: tuple[int, ...]
    dim: int | None


def _find(survey: Survey) -> None:
    config = survey.config
    for name in dict.fromkeys(name for part in _PARTS for name in survey.names(part)):
        parts = [name + part for part in _PARTS if name + part in survey.file]
        first, second = _keys(parts, name, "1"), _keys(parts, name, "2")
        if not survey.usable(name, *first, *second):
            survey.drop(name, parts)
            continue
        one, two = _half(survey.file, first), _half(survey.file, second)
        if one is None or two is None or not _fits(one, two):
            found = f"the shapes {', '.join(str(survey.file[key].shape) for key in (*first, *second))} do not fit together"
            survey.refuse(first[0], found, f"two matrices, rank {LARGEST_RANK} at most", "the module is left out")
            survey.drop(name, parts)
            continue
        _add(survey, config, name, one, two, parts)


def _keys(parts: list[str], name: str, side: str) -> tuple[str, ...]:
    """Keys of one side: the whole matrix where it is there, otherwise its product."""
    whole = f"{name}.lokr_w{side}"
    if whole in parts:
        return (whole,)
    tucker = (f"{name}.lokr_t2",) if side == "2" and f"{name}.lokr_t2" in parts else ()
    return (f"{whole}_a", f"{whole}_b", *tucker)


def _half(file: TensorFile, keys: tuple[str, ...]) -> _Half | None:
    a, *rest = (file[key].shape for key in keys)
    if not rest:
        columns = math.prod(a[1:])
        return _Half(keys, a[0], columns, largest_rank(a[0], columns), a[2:], None)
    b = rest[0]
    if len(rest) == 1:
        fits = a[1] == b[0] and math.prod(a[2:]) == 1
        columns = math.prod(b[1:])
        return _Half(keys, a[0], columns, largest_rank(b[0], a[0], columns), b[2:], b[0]) if fits else None
    t = rest[1]
    fits = a[0] == t[0] and b[0] == t[1] and len(a) == len(b) == 2
    columns = b[1] * math.prod(t[2:])
    return _Half(keys, a[1], columns, largest_rank(t[0], a[1], columns), t[2:], b[0]) if fits else None


def _fits(first: _Half, second: _Half) -> bool:
    rank, side = first.rank * second.rank, max(first.rows * second.rows, first.columns * second.columns)
    largest = max(rank * side, first.rank * max(first.rows, first.columns), second.rank * max(second.rows, second.columns))
    return math.prod(first.kernel) == 1 and largest <= LARGEST_CONVERSION and max(first.rank, second.rank) <= LARGEST_RANK


def _add(survey: Survey, config: PeftConfig, name: str, first: _Half, second: _Half, parts: list[str]) -> None:
    outputs, columns = first.rows * second.rows, first.columns * second.columns
    kernel = second.kernel
    inputs, kernel = (columns // math.prod(kernel), kernel) if kernel else unflatten(name, columns)
    scale = lycoris_scale(survey, config, name, second.dim or first.dim)  # two whole matrices have no rank
    used = survey.taken(name + ".alpha", name + ".scale")
    shape = ModuleShape(outputs, inputs, kernel, first.rank * second.rank)
    text = "LoKr was converted to plain LoRA, its update unchanged to 1e-6"
    whole = max((first, second), key=lambda half: min(half.rows, half.columns))
    survey.tell(converted(text, whole.dim or whole.rows, whole.rows, whole.columns), name)
    load = _loader(survey.file, first, second, scale, inputs, kernel)
    layout, plain = converted_to(config, name, "lokr")
    survey.add(Module(name, layout, shape, (*parts, *used), load, plain, balanced=True))


def _loader(
    file: TensorFile, first: _Half, second: _Half, scale: float, inputs: int, kernel: tuple[int, ...]
) -> Callable[[], LowRankUpdate]:
    def load() -> LowRankUpdate:
        return balanced(kron_svd(_svd(file, first), _svd(file, second)), scale, inputs, kernel)

    return load


def _svd(file: TensorFile, half: _Half) -> Triple:
    a, *rest = (file.read(key).double() for key in half.keys)
    if not rest:
        return svd_of_matrix(a.flatten(1))
    return svd_of_pair(*(cp_pair(a, rest[0], rest[1]) if len(rest) == 2 else (a.flatten(1), rest[0].flatten(1))))


LOKR = Layout("lokr", _find)
