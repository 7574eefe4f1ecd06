"""Full differences, `<module>.diff`: the dense update itself, as LyCORIS' full algorithm and extraction tools store it."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..files.tensors import TensorFile
from ..names.kernels import unflatten
from ..update import LowRankUpdate
from .reduce import balanced, svd_of_matrix
from .sketch import converted, largest_rank
from .survey import LARGEST_CONVERSION, LARGEST_RANK, Layout, Module, ModuleShape, Survey

__all__ = ["FULL"]

_TABLES = (".scale_shift_table", ".modulation")  # of LTX-Video, PixArt and Wan: programs know no pair of factors there


def _find(survey: Survey) -> None:
    for name in [*survey.names(".diff")]:
        key = name + ".diff"
        shape = survey.file[key].shape
        if len(shape) < 2 or name.endswith(_TABLES):
            continue  # of a norm, or a parameter that is no layer's weight: nothing to factor
        if not survey.usable(name, key):
            continue
        if math.prod(shape) > LARGEST_CONVERSION or min(shape[0], math.prod(shape[1:])) > LARGEST_RANK:
            survey.tell("a full difference too large to be factored was carried through unchanged", name)
            continue
        outputs, columns = shape[0], math.prod(shape[1:])
        inputs, kernel = (shape[1], shape[2:]) if shape[2:] else unflatten(name, columns)
        load = _loader(survey.file, key, inputs, kernel)
        text = "a full difference was converted to plain LoRA, unchanged to 1e-6"
        survey.tell(converted(text, outputs, columns), name)
        module = ModuleShape(outputs, inputs, kernel, largest_rank(outputs, columns))
        survey.add(Module(name, "full", module, (key,), load, balanced=True))


def _loader(file: TensorFile, key: str, inputs: int, kernel: tuple[int, ...]) -> Callable[[], LowRankUpdate]:
    def load() -> LowRankUpdate:
        return balanced(svd_of_matrix(file.read(key).double().flatten(1)), 1.0, inputs, kernel)

    return load


FULL = Layout("full", _find)
