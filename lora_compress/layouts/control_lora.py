"""ControlLoRA: a ControlNet stored as updates of the U-Net, `<layer>.down` and `<layer>.up`, without a scale."""

from __future__ import annotations

from .pairs import PairStyle, find_pairs
from .survey import Layout, Survey

__all__ = ["CONTROL_LORA"]

_STYLE = PairStyle("control_lora", ".down", ".up", alphas=())


def _find(survey: Survey) -> None:
    find_pairs(survey, _STYLE)


CONTROL_LORA = Layout("control_lora", _find)
