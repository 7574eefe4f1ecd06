"""cloneofsimo/lora, the first LoRA of Stable Diffusion: modules by number, dW = up @ down without a scale; see `numbered`."""

from __future__ import annotations

from .numbered import KEY, layer_names
from .pairs import PairStyle, find_pairs
from .plain import PlainKeys
from .survey import Layout, Survey

__all__ = ["CLONEOFSIMO"]

_STYLE = PairStyle("cloneofsimo", ":down", ":up", alphas=())


def _find(survey: Survey) -> None:
    if not any(map(KEY.match, survey.file)):
        return
    find_pairs(survey, _STYLE)
    found = {name: module for name, module in survey.modules.items() if module.layout == _STYLE.layout}
    for model in dict.fromkeys(name.partition(":")[0] for name in found):
        numbers = [name for name in found if name.partition(":")[0] == model]
        expected = [f"{model}:{number}" for number in range(len(numbers))]
        if set(numbers) != set(expected):
            absent = next(name for name in expected if name not in found)
            fix = "it is read as it is; programs will put later modules in wrong places"
            survey.refuse(f"{absent}:down", "is missing among modules that are known by their numbers", "every number", fix)
            continue
        sizes = [(found[name].shape.outputs, found[name].shape.inputs) for name in expected]
        flat = not any(found[name].shape.kernel for name in expected)
        names = list(layer_names(sizes)) if flat else []
        for old, new in zip(expected, names or expected, strict=True):
            survey.rename(old, new, PlainKeys(f"{old}:down", f"{old}:up", None))


CLONEOFSIMO = Layout("cloneofsimo", _find)
