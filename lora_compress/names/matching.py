"""Which modules of two LoRA files belong to one layer, where the files spell its name in different ways."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from ..update import ModuleShape
from ..weighting.transformers import TRANSFORMER_BLOCKS
from .base_layers import component_and_path

__all__ = ["fused_layers", "match_layers"]

Shapes = Mapping[str, ModuleShape]
_ORIGINAL = re.compile(rf"({'|'.join(TRANSFORMER_BLOCKS)})_(\d+)_(.+)")


def match_layers(first: Shapes, second: Shapes) -> dict[str, str]:
    """{name in the first file: name in the second} of modules whose layer is the same in two spellings.

    Known are kohya's, PEFT's and diffusers' names, the older attention processors, those of the original U-Nets (input_blocks), and
    of the original FLUX and SD3 transformers where a layer is a whole one in diffusers too. PEFT's files of one model do not tell
    which model it is: their modules belong to any model, if path and size of the layer leave one choice.
    """
    found: dict[str, str] = {}
    for same in (_same_component, _one_unknown):
        forth = _choices(first, second, found, same)
        back = _choices(second, first, {theirs: ours for ours, theirs in found.items()}, same)
        found |= {ours: theirs[0] for ours, theirs in forth.items() if len(theirs) == 1 and back.get(theirs[0]) == [ours]}
    return {name: found[name] for name in first if name in found}


def fused_layers(names: Mapping[str, ModuleShape] | list[str]) -> list[str]:
    """Modules of original transformers, such as img_attn_qkv, that are several layers in diffusers."""
    matches = {name: _ORIGINAL.fullmatch(component_and_path(name)[1]) for name in names}
    return [name for name, m in matches.items() if m and len(TRANSFORMER_BLOCKS[m[1]][1].get(m[3], ())) > 1]


def _same_component(one: str | None, other: str | None) -> bool:
    return one == other


def _one_unknown(one: str | None, other: str | None) -> bool:
    return one is None or other is None


def _choices(
    ours: Shapes, theirs: Shapes, taken: Mapping[str, str], fits: Callable[[str | None, str | None], bool]
) -> dict[str, list[str]]:
    """The modules of the other file that each module may be, those left out that have their pair."""
    by_layer: dict[tuple[object, ...], list[tuple[str | None, str]]] = {}
    gone = set(taken.values())
    for name, shape in theirs.items():
        if name not in gone:
            component, path = _layer(name)
            by_layer.setdefault((path, *_size(shape)), []).append((component, name))
    found = {}
    for name, shape in ours.items():
        if name not in taken:
            component, path = _layer(name)
            found[name] = [other for their, other in by_layer.get((path, *_size(shape)), ()) if fits(component, their)]
    return found


def _layer(name: str) -> tuple[str | None, str]:
    """Component and path of a module's layer as diffusers spells them."""
    component, path = component_and_path(name)
    original = _ORIGINAL.fullmatch(path)
    parts = TRANSFORMER_BLOCKS[original[1]][1].get(original[3], ()) if original else ()
    if original is None or len(parts) != 1:
        return component, path
    return component, f"{TRANSFORMER_BLOCKS[original[1]][0]}_{original[2]}_{parts[0].replace('.', '_')}"


def _size(shape: ModuleShape) -> tuple[int, int]:
    return shape.outputs, shape.inputs * math.prod(shape.kernel)
