"""PEFT's layout: `<module>.lora_A.weight` and `<module>.lora_B.weight`, with an adapter's name between, or bare as Mochi's.

Embeddings have `lora_embedding_A` (r, tokens) and `lora_embedding_B` (width, r): their update is the transpose of the product.
"""

from __future__ import annotations

import re

from ..errors import FormatError
from .pairs import PairStyle, find_pairs
from .survey import Layout, Survey

__all__ = ["PEFT"]

_ADAPTER = re.compile(r"\.lora_[AB]\.(?P<adapter>[^.]+)\.weight$|\.lora_embedding_[AB]\.(?P<embedding>[^.]+)$")

_MOST_ADAPTERS = 8  # a module may be in one only; more than one has been seen where each had a part of the model


def _find(survey: Survey) -> None:
    adapters = {match["adapter"] or match["embedding"]: None for match in map(_ADAPTER.search, survey.file) if match}
    if len(adapters) > _MOST_ADAPTERS:
        raise FormatError(f"{survey.file.path}: holds {len(adapters)} adapters, allowed: {_MOST_ADAPTERS}: split it")
    for ending in [".weight", *(f".{adapter}.weight" for adapter in adapters), ""]:
        find_pairs(survey, PairStyle("peft", f".lora_A{ending}", f".lora_B{ending}"), survey.configured_scale)
    find_pairs(survey, PairStyle("peft", ".lora_a.weight", ".lora_b.weight"), survey.configured_scale)  # torchtune and its like
    for ending in ["", *(f".{adapter}" for adapter in adapters)]:
        style = PairStyle("peft", f".lora_embedding_A{ending}", f".lora_embedding_B{ending}")
        find_pairs(survey, style, survey.configured_scale)


PEFT = Layout("peft", _find)
