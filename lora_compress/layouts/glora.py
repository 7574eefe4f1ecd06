"""LyCORIS GLoRA: dW = alpha / r * (W a1 a2 + b1 b2). Only the second term is an update of its own; the first needs the base W."""

from __future__ import annotations

from collections.abc import Callable

from ..files.tensors import TensorFile
from ..update import LowRankUpdate
from .survey import Layout, Module, ModuleShape, Survey

__all__ = ["GLORA"]

_PARTS = (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")
_OF_BASE = "GLoRA multiplies the base model's weights and was carried through unchanged: it is no update of its own"


def _find(survey: Survey) -> None:
    for name in [*survey.names(_PARTS[0])]:
        keys = [name + part for part in _PARTS]
        if not all(key in survey.file for key in keys[1:]):
            continue  # a1.weight alone is some layer's name
        if not survey.usable(name, *keys):
            continue
        order = _order(survey.file, keys)
        if order is None:
            found = ", ".join(str(survey.file[key].shape) for key in keys)
            survey.refuse(keys[0], f"the shapes {found} do not fit together", "two products", "the module is left out")
            survey.drop(name, keys)
        elif name + ".bm.weight" in survey.file or _moves(survey.file, keys[0], keys[1]):
            survey.tell(_OF_BASE, name)
        else:
            _add(survey, name, keys, *order)


def _order(file: TensorFile, keys: list[str]) -> tuple[str, str] | None:
    """Keys of up and down. LyCORIS swapped b1 and b2 once: for a square layer the long side of a2 tells the two apart."""
    a1, a2, b1, b2 = (file[key].shape for key in keys)
    older = b2[1] == b1[0] == a1[0] == a2[1]
    newer = b2[0] == b1[1] == a1[1] == a2[0]
    if not (older or newer):
        return None
    return (keys[3], keys[2]) if older and not (newer and a2[0] <= a2[1]) else (keys[2], keys[3])


def _moves(file: TensorFile, *keys: str) -> bool:
    """Whether W a1 a2 may be anything but zero; a factor is left at zero where it was never trained."""
    return all(bool((file.read(key).float() != 0).any()) for key in keys)


def _add(survey: Survey, name: str, keys: list[str], up: str, down: str) -> None:
    outputs, rank, *_ = survey.file[up].shape
    _, inputs, *kernel = survey.file[down].shape
    alpha = survey.alpha(name + ".alpha")
    used = survey.taken(name + ".alpha")
    shape = ModuleShape(outputs, inputs, tuple(kernel), rank)
    load = _loader(survey.file, up, down, shape, float(rank) if alpha is None else alpha)
    survey.tell("GLoRA was read as plain LoRA: its part on the base weights is zero", name)
    survey.add(Module(name, "glora", shape, (*keys, *used), load))


def _loader(file: TensorFile, up: str, down: str, shape: ModuleShape, alpha: float) -> Callable[[], LowRankUpdate]:
    def load() -> LowRankUpdate:
        sides = file.read(up).reshape(shape.outputs, shape.rank, *([1] * len(shape.kernel)))
        return LowRankUpdate(file.read(down), sides, alpha)

    return load


GLORA = Layout("glora", _find)
