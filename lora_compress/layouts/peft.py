"""PEFT's layout: `<module>.lora_A.weight` and `<module>.lora_B.weight`, with an adapter's name between, or bare as Mochi's."""

from __future__ import annotations

import re

from ..errors import FormatError
from .pairs import PairStyle, find_pairs
from .peft_config import PeftConfig
from .survey import Layout, Survey

__all__ = ["PEFT"]

_ADAPTER = re.compile(r"\.lora_[AB]\.(?P<adapter>[^.]+)\.weight$")

_MOST_ADAPTERS = 8  # a module may be in one only; more than one has been seen where each had a part of the model


def _find(survey: Survey) -> None:
    config = PeftConfig.of(survey.file)
    adapters = {match["adapter"]: None for match in map(_ADAPTER.search, survey.file) if match}
    if len(adapters) > _MOST_ADAPTERS:
        raise FormatError(f"{survey.file.path}: holds {len(adapters)} adapters, allowed: {_MOST_ADAPTERS}: split it")
    endings = [".weight", *(f".{adapter}.weight" for adapter in adapters), ""]

    def scale_of(name: str, rank: int) -> float | None:
        scale = config.scale(name, rank)
        if scale not in (None, 1.0):
            survey.tell("alpha is taken from the configuration of the adapter and is now part of the factors", name)
        return scale

    for ending in endings:
        find_pairs(survey, PairStyle("peft", f".lora_A{ending}", f".lora_B{ending}"), scale_of)
    find_pairs(survey, PairStyle("peft", ".lora_a.weight", ".lora_b.weight"), scale_of)  # torchtune and its like


PEFT = Layout("peft", _find)
