"""A page about a training: what its evaluations measured, how its compression changed with them, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from .html import page, tiles
from .html_charts import horizontal_line, linear_ticks, path_through, size_text, svg

__all__ = ["history_body", "history_notes", "history_page"]

_WIDTH, _HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 42
_STYLES = ("line", "line second")  # of the lines of a chart

Point = tuple[int, float]


def history_page(name: str, history: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """The page of a history as `evaluation.validation.write_history` has it, the oldest entry first.

    Args:
        name: of the training.
        history: at least one entry; those of evaluations that failed, and those without a controller, are told as what they are.
        settings: of the training, shown as they are.
    """
    body = tiles(_headline(history, _measured(history))) + history_body(history)
    about = f"{history[-1].get('pictures', 0)} pictures each time, measured by {history[-1].get('extractor', 'nothing')}"
    return page(name, "evaluations of a training", escape(about), body, history_notes(history), settings)


def history_body(history: Sequence[Mapping[str, Any]]) -> str:
    """Charts of a history, and its table."""
    metrics = _measured(history)
    charts = [
        _chart(metric, {metric: _points(history, metric), "uncompressed": _points(history, f"{metric}_full")}, _short)
        for metric in metrics
    ]
    charts += [_chart("rank_ratio", {"rank_ratio": _points(history, "rank_ratio")}, _short)]
    charts += [_chart("bits per weight", {"bits": _points(history, "bits")}, _short)]
    charts += [_chart("bytes of the file", {"bytes": _points(history, "bytes")}, size_text)]
    return f'<div class="pair">{"".join(charts)}</div>' + _table(history, metrics)


def history_notes(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the user should be told of a history."""
    return [f"step {entry['step']}: the evaluation failed ({entry['error']})" for entry in history if "error" in entry]


def _measured(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Metrics of any entry: an evaluation that failed has none."""
    return list(dict.fromkeys(key.removesuffix("_interval") for entry in history for key in entry if key.endswith("_interval")))


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    values = [(entry["step"], entry.get(key)) for entry in history]
    return [(step, float(value)) for step, value in values if isinstance(value, (int, float)) and math.isfinite(value)]


def _headline(history: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[tuple[str, str, str]]:
    last, changes = history[-1], sum("next" in entry for entry in history)
    numbers = [(f"{len(history)}", "evaluations", f"the last after step {last['step']}")]
    for metric in metrics:
        if points := _points(history, metric):
            floors = _points(history, f"{metric}_floor")
            numbers.append((_short(points[-1][1]), metric, f"floor {_short(floors[-1][1])}" if floors else ""))
    if sizes := _points(history, "bytes"):
        numbers.append((size_text(sizes[-1][1]), "size", f"was {size_text(sizes[0][1])}"))
    if "action" in last:
        numbers.append((f"{changes}", "changes of the compression", ""))
    return numbers


def _chart(caption: str, lines: Mapping[str, Sequence[Point]], text: Callable[[float], str]) -> str:
    """A figure with a line for each series that has points; nothing where none has."""
    drawn = {label: points for label, points in lines.items() if points}
    if not drawn:
        return ""
    every = [point for points in drawn.values() for point in points]
    first, last = min(step for step, _ in every), max(step for step, _ in every)
    top = max(max(value for _, value in every), 1e-9) * 1.08

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - first) / max(last - first, 1) * (_WIDTH - _LEFT - _RIGHT)
        return x, _TOP + (1 - max(value, 0.0) / top) * (_HEIGHT - _TOP - _BOTTOM)

    shapes = [horizontal_line(place(first, value)[1], escape(text(value)), _LEFT) for value in linear_ticks(top)]
    for step in sorted({first, (first + last) // 2, last}):
        x = place(step, 0.0)[0]
        shapes.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}">{step}</text>')
    for style, (label, points) in zip(_STYLES, drawn.items(), strict=False):
        places = [place(*point) for point in points]
        shapes.append(f'<path class="{style}" d="{path_through(places)}"/>')
        for (x, y), (step, value) in zip(places, points, strict=True):
            told = f"{escape(label)} after step {step}: {escape(text(value))}"
            shapes.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{told}</title></circle>')
    shapes.append(f'<text class="axis" text-anchor="middle" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}">step</text>')
    second = ' <span class="unit">dashed: of the uncompressed weights</span>' if len(drawn) > 1 else ""
    drawing = svg(f"{caption} over the steps", shapes, _HEIGHT, _WIDTH)
    return f"<figure><figcaption>{escape(caption)}{second}</figcaption>{drawing}</figure>"


def _table(history: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    headings = ["step", *metrics, "rank_ratio", "bits", "strategy", "action", "reason"]
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(_cell(entry.get(name)))}</td>' for name in headings)}</tr>"
        for entry in ({"reason": entry.get("error"), **entry} for entry in history)
    )
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    table = f'<table class="measures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<section><h2>Evaluations and decisions</h2><div class="scroll-x">{table}</div></section>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return _short(value)
    return "–" if value is None else str(value)


def _short(value: float) -> str:
    return f"{value:.4g}"
