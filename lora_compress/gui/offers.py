"""What can be made of an uploaded file: two kinds of files, the sizes to choose from, and what each size would lose."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..cli.console import megabytes
from ..inspection.file import FileInspection
from ..text import as_html

__all__ = ["PACKED", "PLAIN", "SETTINGS", "Curve", "SizeRange", "about", "chart_rows", "curves", "size_range"]

Curve = Sequence[tuple[int, float]]
PLAIN, PACKED = "opens everywhere", "smallest"
SETTINGS = {PLAIN: {"save_format": "kohya"}, PACKED: {"save_format": "packed", "strategy": "entropy"}}
_USUAL_ERROR, _MOST_ERROR = 0.05, 0.6  # images change little up to the one, and beyond the other little of the LoRA is left


@dataclass(frozen=True)
class SizeRange:
    """A slider in megabytes; all of them are multiples of `step`."""

    smallest: float
    largest: float
    usual: float
    step: float


def curves(found: FileInspection) -> dict[str, Curve]:
    """(bytes, relative error) by the kind of file that is made."""
    return {PLAIN: found.curve, PACKED: found.packed_curve}


def size_range(curve: Curve, size: int) -> SizeRange:
    """From the smallest file of the curve to just below the input of `size` bytes, and what an error of 5 % takes."""
    smaller = sorted((point, error) for point, error in curve if point < 0.95 * size and error <= _MOST_ERROR)
    step = 10.0 ** (math.floor(math.log10(max(size, 1000) / 1e6)) - 2)
    lowest = smaller[0][0] if smaller else size / 10
    usual = next((point for point, error in smaller if error <= _USUAL_ERROR), smaller[-1][0] if smaller else size / 2)
    low, high = math.ceil(lowest / 1e6 / step), max(math.ceil(size / 1e6 / step) - 1, 2)
    low = min(low, high - 1)
    middle = min(max(math.ceil(usual / 1e6 / step), low), high)
    smallest, largest, usual_size = (round(steps * step, 9) for steps in (low, high, middle))
    return SizeRange(smallest, largest, usual_size, step)


def chart_rows(found: dict[str, Curve], size: int) -> list[tuple[float, float, str]]:
    """(megabytes, error in percent, kind) of the points that are smaller than the input of `size` bytes."""
    return [
        (round(point / 1e6, 4), round(100 * error, 2), kind)
        for kind, curve in found.items()
        for point, error in sorted(curve)
        if point < size
    ]


def about(found: FileInspection) -> str:
    """A short description as HTML; everything in it is escaped."""
    low, high = found.ranks
    rows = {
        "file": os.path.basename(found.path),
        "model family": found.family,
        "layout": found.layout,
        "modules": str(len(found.modules)),
        "rank": str(low) if low == high else f"{low} to {high}",
        "precision": found.stored_as,
        "size": megabytes(found.bytes),
    }
    cells = "".join(f'<tr><th scope="row">{name}</th><td>{as_html(value)}</td></tr>' for name, value in rows.items())
    notes = "".join(f"<li>{as_html(note.replace(found.path, rows['file']))}</li>" for note in dict.fromkeys(found.notes))
    return f'<table class="about">{cells}</table>' + (f"<ul>{notes}</ul>" if notes else "")
