"""Layouts that multiply the base weights (OFT, BOFT, IA3): known by their keys, and carried through as they are."""

from __future__ import annotations

from .survey import Layout, Survey

__all__ = ["MULTIPLICATIVE"]

_MARKS = {
    ".oft_blocks": "OFT or BOFT",
    ".oft_diag": "OFT",
    ".boft_R": "BOFT",
    ".oft_R.weight": "OFT",
    ".on_input": "IA3",
    ".ia3_l": "IA3",
}


def _find(survey: Survey) -> None:
    for ending, kind in _MARKS.items():
        for name in survey.names(ending):
            survey.tell(f"{kind} multiplies the base model's weights and was carried through unchanged", name)


MULTIPLICATIVE = Layout("multiplicative", _find)
