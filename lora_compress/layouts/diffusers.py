"""diffusers' layouts from before PEFT: `.lora.down.weight`, `_lora.down.weight`, `.lora_linear_layer.down.weight`."""

from __future__ import annotations

import re

from .pairs import PairStyle, find_pairs
from .survey import Layout, Survey

__all__ = ["DIFFUSERS"]

_ENDINGS = (".lora", "_lora", ".lora_linear_layer", ".lora_layer")
_NUMBERED = re.compile(r"_lora\d$")  # qkv_lora1 and qkv_lora2: two updates of one attention processor


def _find(survey: Survey) -> None:
    for ending in _ENDINGS:
        alphas = (".alpha", f"{ending}.alpha")
        style = PairStyle("diffusers", f"{ending}.down.weight", f"{ending}.up.weight", alphas=alphas)
        find_pairs(survey, style, survey.configured_scale)
    names = [*survey.names(".down.weight"), *survey.names(".up.weight")]
    for own in dict.fromkeys(match[0] for match in map(_NUMBERED.search, names) if match):
        find_pairs(survey, PairStyle("diffusers", f"{own}.down.weight", f"{own}.up.weight", own=own))


DIFFUSERS = Layout("diffusers", _find)
