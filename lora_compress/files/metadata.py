"""The metadata of a LoRA file: entries that would become wrong are corrected, and what was done to the file is added."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

__all__ = ["ModuleScale", "alpha_in_header", "finish_metadata", "header_notes", "true_header"]

_OF_ONE_FILE = ("ss_compress_", "lora_compress_", "sshs_")

# Keys under which trainers tell alpha and rank, alone or after the name of a model (transformer.lora_alpha). SGLang, and diffusers
# for MiniMax-H3, divide one by the rank of the tensors where a file has no alpha of its own.
_ALPHA = re.compile(r"(?:(?P<model>[\w.]+)\.)?(?:lora_|network_)?alpha")
_RANK = re.compile(r"(?:(?P<model>[\w.]+)\.)?(?:(?:lora_|network_)?rank|lora_r|r|(?:lora_|network_)dim)")
_CONFIG = "lora_adapter_metadata"  # of diffusers, see layouts/peft_config.py
_PATTERNS = re.compile(r"(?:[\w.]+\.)?(?:rank|alpha)_pattern")


class ModuleScale(NamedTuple):
    """What alpha and rank in the metadata depend on.

    Args:
        rank: of a module in the file.
        gain: its alpha in the file / its alpha in the input; None where it is not known yet.
    """

    rank: int
    gain: float | None


def finish_metadata(
    metadata: Mapping[str, str] | None, ranks: Iterable[int], alphas: Iterable[float], details: Mapping[str, Any]
) -> dict[str, str]:
    """Return the metadata of a compressed file, made from those of its input. The writer adds the hashes.

    ss_network_dim and ss_network_alpha become the common rank and alpha, or "Dynamic" where they differ, as sd-scripts' own
    resize tool writes; `details` goes in as ss_compress_* keys, and those of an earlier compression go.

    Args:
        metadata: of the host or of the input.
        ranks: of the modules that the file holds.
        alphas: likewise.
        details: what was done; None is left out.
    """
    finished = {key: value for key, value in (metadata or {}).items() if not key.startswith(_OF_ONE_FILE)}
    truth = {"ss_network_dim": set(map(str, ranks)), "ss_network_alpha": set(map(str, alphas))}
    for key, values in truth.items():
        if key in finished:
            finished[key] = values.pop() if len(values) == 1 else "Dynamic"
    return finished | {f"ss_compress_{key}": _text(value) for key, value in details.items() if value is not None}


def true_header(metadata: Mapping[str, str], modules: Mapping[str, ModuleScale]) -> dict[str, str]:
    """Return metadata whose entries for alpha and rank, where there are any, are true of a file with these modules.

    A program that divides the header's alpha by the rank of the tensors gets the strength that it got from the input: alpha is
    multiplied by the gain. What is not the same for all modules cannot be said by one number, and is taken out.

    Args:
        metadata: of the input.
        modules: by name; a model's own keys are those of the modules whose names begin with it.
    """
    return {key: value for key, old in metadata.items() if (value := _true_value(metadata, key, old, modules)) is not None}


def _true_value(metadata: Mapping[str, str], key: str, old: str, modules: Mapping[str, ModuleScale]) -> str | None:
    if _PATTERNS.fullmatch(key):
        return None
    found = _ALPHA.fullmatch(key) or _RANK.fullmatch(key)
    number = _number(old)
    if found is None or number is None:
        return old
    model = f"{found['model']}." if found["model"] else ""
    own = [scale for name, scale in modules.items() if name.startswith(model)] or list(modules.values())
    if _RANK.fullmatch(key):
        ranks = {scale.rank for scale in own}
        return str(ranks.pop()) if len(ranks) == 1 else None
    gains = {scale.gain for scale in own}
    gain = gains.pop() if len(gains) == 1 else None
    if gain is None or metadata.get(f"{model}use_rslora", "false").lower() not in ("false", "0", ""):
        return None
    value = number * gain
    return old if value == number else str(int(value)) if value == int(value) else f"{value:.9g}"


def alpha_in_header(metadata: Mapping[str, str], name: str) -> float | None:
    """Return the alpha of a module by the metadata, under its model's key or one for the whole file; None where there is none."""
    for key, value in metadata.items():
        found = _ALPHA.fullmatch(key)
        if found and (not found["model"] or name.startswith(f"{found['model']}.")):
            return _number(value)
    return None


def header_notes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Say in one sentence what became of alpha and rank in the metadata; nothing where they stayed."""
    told = [key for key in before if _ALPHA.fullmatch(key) or _RANK.fullmatch(key) or _PATTERNS.fullmatch(key)]
    changed = [f"{key} {before[key]} is now {after[key]}" for key in told if key in after and after[key] != before[key]]
    gone = [f"{key} {before[key]} was taken out, since modules differ" for key in told if key not in after]
    if before.get(_CONFIG) != after.get(_CONFIG):
        changed.append(f"{_CONFIG} has the ranks of this file, and alphas that are the ranks")
    if not (changed or gone):
        return []
    return [f"what the header tells of alpha and rank was brought up to date: {'; '.join([*changed, *gone])}"]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
