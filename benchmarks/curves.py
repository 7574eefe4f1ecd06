"""Draws the rate-distortion curves: a panel for each LoRA, one legend for all, as an SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

__all__ = ["STYLE_SHEET", "stroke", "write_plot"]

_PANEL = (306, 240)
_MARGINS = (40, 22, 26, 36)  # left, right, top, bottom of a panel
_COLUMNS = 3
_LEGEND = 46
_LOW_ERROR, _HIGH_ERROR = 0.02, 0.5
_ERROR_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5)
_SHARE_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# name: colour, width, dashes, whether points are marked
_STYLES: dict[str, tuple[str, float, str, bool]] = {
    "ours: entropy": ("#0b57d0", 2.6, "", False),
    "ours: mixed": ("#c2410c", 1.8, "", False),
    "ours: int4": ("#7c3aed", 1.4, "", False),
    "truncation, fp16": ("#5f6368", 1.4, "2 3", False),
    "truncation + int8": ("#0f7b6c", 1.4, "6 3", False),
    "truncation + NF4": ("#b0851a", 1.4, "9 3 2 3", False),
    "LoRAQuant": ("#c026a3", 0.0, "", True),
    "Shannon's bound": ("#111111", 1.0, "", False),
}
STYLE_SHEET = (
    "text{font:11px system-ui,sans-serif;fill:#333}.title{font-weight:600;font-size:12px;fill:#111}.axis{fill:#555}"
    ".grid{stroke:#e3e3e3;stroke-width:1}.frame{fill:none;stroke:#bbb}"
)

Point = tuple[float, float]


def write_plot(path: Path, curves: Mapping[str, Mapping[str, Sequence[Point]]], sizes: Mapping[str, float]) -> None:
    """Write {LoRA: {what: (bytes, relative error)}} to `path`; bytes are shown as shares of `sizes`, both axes logarithmic."""
    columns = min(_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    width, height = max(columns * _PANEL[0], 2 * _PANEL[0]) + 12, rows * _PANEL[1] + _LEGEND + 24
    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>', *_legend(width)]
    for index, (label, lines) in enumerate(curves.items()):
        x, y = 6 + index % columns * _PANEL[0], _LEGEND + index // columns * _PANEL[1]
        parts.append(f'<g transform="translate({x} {y})">{"".join(_panel(index, label, lines, sizes[label]))}</g>')
    middle = width / 2
    caption = "relative error of the update against bytes / bytes of the LoRA in fp16, both logarithmic"
    parts.append(f'<text class="axis" text-anchor="middle" x="{middle}" y="{height - 8}">{caption}</text>')
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
    text = f"{svg}><title>Relative error against bytes</title><style>{STYLE_SHEET}</style>{''.join(parts)}</svg>\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _legend(width: int) -> list[str]:
    parts, x, y = [], 14.0, 16.0
    for name, (colour, thick, dashes, marked) in _STYLES.items():
        wide = 34 + 6.4 * len(name) + 14
        if x + wide > width:
            x, y = 14.0, y + 18
        parts.append(_mark(x + 11, y - 4, colour) if marked else stroke(f"M{x} {y - 4}h22", colour, thick, dashes))
        parts.append(f'<text x="{x + 28}" y="{y}">{escape(name)}</text>')
        x += wide
    return parts


def _panel(index: int, label: str, lines: Mapping[str, Sequence[Point]], full: float) -> list[str]:
    left, right, top, bottom = _MARGINS
    wide, high = _PANEL[0] - left - right, _PANEL[1] - top - bottom
    low_share = _lowest_share(lines, full)

    def place(share: float, error: float) -> Point:
        x = left + wide * math.log(share / low_share) / math.log(1.0 / low_share)
        return x, top + high * math.log(_HIGH_ERROR / error) / math.log(_HIGH_ERROR / _LOW_ERROR)

    parts = [f'<clipPath id="c{index}"><rect x="{left}" y="{top}" width="{wide}" height="{high}"/></clipPath>']
    parts.append(f'<text class="title" x="{left}" y="{top - 8}">{escape(label)}</text>')
    for error in _ERROR_TICKS:
        y = place(1.0, error)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{wide}"/>')
        parts.append(f'<text text-anchor="end" x="{left - 5}" y="{y + 4:.1f}">{error:.0%}</text>')
    for share in (tick for tick in _SHARE_TICKS if tick >= low_share):
        x = place(share, 1.0)[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {top}v{high}"/>')
        parts.append(f'<text text-anchor="middle" x="{x:.1f}" y="{top + high + 16}">{share:.0%}</text>')
    parts.append(f'<rect class="frame" x="{left}" y="{top}" width="{wide}" height="{high}"/><g clip-path="url(#c{index})">')
    for name in reversed(_STYLES):
        colour, thick, dashes, marked = _STYLES[name]
        places = [place(size / full, error) for size, error in sorted(lines.get(name, ())) if size > 0 and error > 0]
        if marked:
            parts += [_mark(x, y, colour) for x, y in places]
        elif places:
            parts.append(stroke("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places), colour, thick, dashes))
    return [*parts, "</g>"]


def _lowest_share(lines: Mapping[str, Sequence[Point]], full: float) -> float:
    """The tick under the smallest share that any curve but the bound has in view."""
    seen = [
        size / full
        for name, points in lines.items()
        if name in _STYLES
        for size, error in points
        if _LOW_ERROR <= error <= _HIGH_ERROR
    ]
    return max((tick for tick in _SHARE_TICKS if tick <= min(seen, default=1.0)), default=_SHARE_TICKS[0])


def stroke(path: str, colour: str, thick: float, dashes: str) -> str:
    """A line along an SVG path; dashes as stroke-dasharray takes them, or none."""
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{thick}" stroke-linejoin="round"{dashed}/>'


def _mark(x: float, y: float, colour: str) -> str:
    return f'<path d="M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4 -4z" fill="{colour}" fill-opacity="0.75"/>'
