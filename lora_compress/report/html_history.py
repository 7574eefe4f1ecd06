"""A page about a training: what its evaluations measured, how its compression changed with them, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..text import as_html
from .charts import BYTES, DESCRIBED, chart, size_text
from .html import page, tiles

__all__ = ["history_body", "history_notes", "history_page"]

_DASHES = [[1, 0], [5, 4]]  # of the lines of a chart
_NUMBER = {"format": "~g"}  # an axis

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
    return page(name, "evaluations of a training", as_html(about), body, history_notes(history), settings)


def history_body(history: Sequence[Mapping[str, Any]]) -> str:
    """Charts of a history, and its table."""
    metrics = _measured(history)
    charts = [
        _chart(metric, {metric: _points(history, metric), "uncompressed": _points(history, f"{metric}_full")}, _NUMBER)
        for metric in metrics
    ]
    charts += [_chart("rank_ratio", {"rank_ratio": _points(history, "rank_ratio")}, _NUMBER)]
    charts += [_chart("bits per weight", {"bits": _points(history, "bits")}, _NUMBER)]
    charts += [_chart("bytes of the file", {"bytes": _points(history, "bytes")}, BYTES)]
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


def _chart(caption: str, lines: Mapping[str, Sequence[Point]], axis: Mapping[str, Any]) -> str:
    """A figure with a line for each series that has points; nothing where none has."""
    drawn = [label for label, points in lines.items() if points]
    if not drawn:
        return ""
    text = size_text if axis is BYTES else _short
    rows = [
        {"step": step, "value": value, "line": label, "told": f"{label} after step {step}: {text(value)}"}
        for label in drawn
        for step, value in lines[label]
    ]
    dashes = {"domain": drawn, "range": _DASHES[: len(drawn)]}
    spec = {
        "width": 390,
        "height": 170,
        "data": {"values": rows},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step", "scale": {"zero": False, "nice": False, "padding": 6}}
            | {"axis": {"format": "d", "tickMinStep": 1, "tickCount": 6, "grid": False}},
            "y": {"field": "value", "type": "quantitative", "title": None, "axis": {"tickCount": 4, **axis}},
            "detail": {"field": "line"},
        },
        "layer": [
            {"mark": "line", "encoding": {"strokeDash": {"field": "line", "scale": dashes, "legend": None}}},
            {"mark": "point", "encoding": DESCRIBED},
        ],
    }
    second = ' <span class="unit">dashed: of the uncompressed weights</span>' if len(drawn) > 1 else ""
    return f"<figure><figcaption>{as_html(caption)}{second}</figcaption>{chart(f'{caption} over the steps', spec)}</figure>"


def _table(history: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    headings = ["step", *metrics, "rank_ratio", "bits", "strategy", "action", "reason"]
    rows = "".join(
        f"<tr>{''.join(f'<td>{as_html(_cell(entry.get(name)))}</td>' for name in headings)}</tr>"
        for entry in ({"reason": entry.get("error"), **entry} for entry in history)
    )
    head = "".join(f"<th>{as_html(heading)}</th>" for heading in headings)
    table = f'<table class="measures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<section><h2>Evaluations and decisions</h2><div class="scroll-x">{table}</div></section>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return _short(value)
    return "–" if value is None else str(value)


def _short(value: float) -> str:
    return f"{value:.4g}"
