"""What is drawn when there are no captions: lines of a file, or stock prompts with the words that the LoRA was trained on."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..errors import EvaluationError

__all__ = ["STOCK_PROMPTS", "read_prompts", "stock_prompts"]

STOCK_PROMPTS = (
    "a portrait of a woman, soft light",
    "a man walking through a city street in the rain",
    "a cat sleeping on a wooden chair",
    "a mountain lake at sunrise",
    "a bowl of fruit on a table, still life",
    "an old house at the edge of a forest",
    "a red car parked in front of a shop",
    "a close-up of a flower with drops of water",
)
_WORDS = 3


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """One prompt a line; empty lines and those that begin with # count for nothing.

    Raises:
        EvaluationError: no such file, or nothing in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}): give a text file with one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise EvaluationError(f"{path}: holds no prompt: write one a line")
    return prompts


def stock_prompts(metadata: Mapping[str, str]) -> list[str]:
    """Everyday prompts, each behind the most frequent words of the captions that the LoRA was trained on (ss_tag_frequency)."""
    counts: Counter[str] = Counter()
    try:
        for tags in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, AttributeError, TypeError):
        counts = Counter()  # what others wrote there is no reason not to draw
    words = ", ".join(tag for tag, _ in counts.most_common(_WORDS))
    return [f"{words}, {prompt}" if words else prompt for prompt in STOCK_PROMPTS]
