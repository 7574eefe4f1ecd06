"""Adapters that are no LoRA (OFT, BOFT, IA3, VeRA ...): known by their keys, and carried through as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .survey import Layout, Survey

__all__ = ["CARRIED", "FOREIGN", "foreign_kind"]

CARRIED = " and was carried through unchanged"
_MULTIPLIED = "{} multiplies the base model's weights" + CARRIED
_ELSE = "{} is an adapter that is not read here" + CARRIED

# Parts of keys, the adapter that writes them, and whether it multiplies the base model's weights. LyCORIS' names, then PEFT's:
# the prefix of each tuner in peft/tuners/*/model.py of 0.17 and 0.21.
_MARKS: tuple[tuple[str, str, str], ...] = (
    (r"\.oft_blocks$", "OFT or BOFT", _MULTIPLIED),
    (r"\.(oft_diag|oft_R(\.[^.]+)*|oft_r(\.[^.]+)*|oft_s)$", "OFT", _MULTIPLIED),
    (r"\.boft_(R|s)(\.[^.]+)*$", "BOFT", _MULTIPLIED),
    (r"\.(on_input|ia3_l(\.[^.]+)*)$", "IA3", _MULTIPLIED),
    (r"(^|\.)hra_u(\.|$)", "HRA", _MULTIPLIED),
    (r"(^|\.)road_(theta|alpha)(\.|$)", "RoAd", _MULTIPLIED),
    (r"(^|\.)hira_", "HiRA", _MULTIPLIED),
    (r"(^|\.)psoft_", "PSOFT", _MULTIPLIED),
    (r"(^|\.)ln_tuning_", "LN tuning", _ELSE),
    (r"(^|\.)pvera_", "PVeRA", _ELSE),
    (r"(^|\.)vera_", "VeRA", _ELSE),
    (r"(^|\.)(miss|bone)_", "MiSS (formerly Bone)", _ELSE),
    (r"(^|\.)delora_", "DeLoRA", _ELSE),
    (r"(^|\.)gralora_", "GraLoRA", _ELSE),
    (r"(^|\.)randlora_", "RandLoRA", _ELSE),
    (r"(^|\.)fourierft_", "FourierFT", _ELSE),
    (r"(^|\.)waveft_", "WaveFT", _ELSE),
    (r"(^|\.)c3a_", "C3A", _ELSE),
    (r"(^|\.)shira_", "SHiRA", _ELSE),
    (r"(^|\.)vblora_", "VB-LoRA", _ELSE),
    (r"(^|\.)glora_", "PEFT's GLoRA", _ELSE),
    (r"(^|\.)unilora_", "Uni-LoRA", _ELSE),
    (r"(^|\.)tinylora_", "TinyLoRA", _ELSE),
    (r"(^|\.)(adamss|beft|cartridge|deft|frod|lily|osf|peanut|poly|shadow|supertuning|xlora)_", "another PEFT method", _ELSE),
    (r"(^|\.)(trainable_tokens_|prompt_embeddings|adaption_prompt)", "prompt or token tuning", _ELSE),
)
_EXPRESSIONS = tuple((re.compile(mark), kind, note) for mark, kind, note in _MARKS)


def foreign_kind(keys: Iterable[str]) -> str:
    """The name of the adapter that writes the first such key, "" where none of the keys is of one."""
    return next((kind for key in keys for mark, kind, _ in _EXPRESSIONS if mark.search(key)), "")


def _find(survey: Survey) -> None:
    for key in survey.free():
        for mark, kind, note in _EXPRESSIONS:
            if found := mark.search(key):
                survey.tell(note.format(kind), key[: found.start()] or key)
                break


FOREIGN = Layout("foreign", _find)
