"""Heat maps of a compressed file: blocks of the model from left to right, kinds of layers from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..text import as_html
from .charts import DESCRIBED, chart
from .file_report import ModuleReport
from .html_blocks import Place, place_of

__all__ = ["heat_maps"]

_RAMP = [f"var(--h{step})" for step in range(9)]
_CELL = (13, 19)  # smallest and largest, pixels
_WIDTH = 900  # of all cells, where that leaves them no smaller
_FLAT = 0.01  # a map whose values differ by less says nothing

Measure = Callable[[ModuleReport], float]
Cell = tuple[Place, list[ModuleReport]]


def heat_maps(modules: Sequence[ModuleReport]) -> str:
    """Rank and bits per weight for each part of the model; a measure that is the same everywhere is said in a sentence."""
    parts: dict[str, list[ModuleReport]] = {}
    for module in modules:
        parts.setdefault(module.part, []).append(module)
    drawn = "".join(
        _map(part, own, title, unit, measure)
        for part, own in parts.items()
        for title, unit, measure in (
            ("components kept", "", lambda module: float(module.rank[1])),
            ("bits per weight", "bit", lambda module: module.bits),
        )
    )
    return f'<div class="maps">{drawn}</div>'


def _map(part: str, modules: Sequence[ModuleReport], title: str, unit: str, measure: Measure) -> str:
    kept = [measure(module) for module in modules if module.rank[1]]
    dropped = len(modules) - len(kept)
    if not kept:
        return f"<p><b>{as_html(part)}: {title}</b>: every module was dropped.</p>"
    low, high = min(kept), max(kept)
    if high - low <= _FLAT * high and not dropped:
        return f"<p><b>{as_html(part)}: {title}</b>: {high:.4g} {unit} in every module.</p>"
    gone = f"; dashed: dropped ({dropped})" if dropped else ""
    caption = f'<figcaption>{as_html(part)}: {title} <span class="unit">mean in a cell{gone}</span></figcaption>'
    cells = _cells(modules)
    rows = [_row(place, own, measure, unit) for place, own in cells]
    bounds = (low, high) if high > low else (low - 0.5, high + 0.5)
    label = f"{part}: {title} by block and kind of layer"
    return f'<figure>{caption}<div class="scroll-x">{chart(label, _spec(cells, rows, bounds), fluid=False)}</div></figure>'


def _spec(cells: Sequence[Cell], rows: Sequence[dict[str, Any]], bounds: tuple[float, float]) -> dict[str, Any]:
    blocks = [block for _, block in sorted({place.order: place.block for place, _ in cells}.items())]
    cell = int(min(max(_WIDTH / len(blocks), _CELL[0]), _CELL[1]))
    axis = {"title": None, "grid": False, "labelFontSize": 11, "labelLimit": 400}
    ramp = {"type": "quantize", "domain": list(bounds), "range": _RAMP}
    legend = {"title": None, "format": ".3~g", "gradientLength": 200, "gradientThickness": 10}
    return {
        "width": {"step": cell},
        "height": {"step": cell},
        "data": {"values": list(rows)},
        "encoding": {
            "x": {"field": "block", "type": "ordinal", "sort": blocks, "axis": {**axis, "labelAngle": -90}},
            "y": {"field": "kind", "type": "ordinal", "sort": _kinds(cells), "axis": axis},
            **DESCRIBED,
        },
        "layer": [
            {
                "transform": [{"filter": "datum.mean !== null"}],
                "mark": {"type": "rect", "cornerRadius": 2, "stroke": "var(--card)", "strokeWidth": 2},
                "encoding": {"color": {"field": "mean", "type": "quantitative", "scale": ramp, "legend": legend}},
            },
            {
                "transform": [{"filter": "datum.mean === null"}],
                "mark": {"type": "point", "shape": "square", "size": (cell - 4) ** 2, "filled": False}
                | {"fill": "transparent", "stroke": "var(--warm)", "strokeDash": [2.5, 2]},
            },
        ],
    }


def _cells(modules: Sequence[ModuleReport]) -> list[Cell]:
    """Modules that share a block and a kind share a cell."""
    cells: dict[tuple[str, str], Cell] = {}
    for module in modules:
        place = place_of(module.name)
        cells.setdefault((place.block, place.kind), (place, []))[1].append(module)
    return list(cells.values())


def _kinds(cells: Sequence[Cell]) -> list[str]:
    """Kinds by the first block that has them, then by name: those of one kind of block stand together."""
    first: dict[str, tuple[int, str]] = {}
    for place, _ in cells:
        key = (place.order[0], place.order[1])
        first[place.kind] = min(first.get(place.kind, key), key)
    return sorted(first, key=lambda kind: (first[kind], kind))


def _row(place: Place, modules: list[ModuleReport], measure: Measure, unit: str) -> dict[str, Any]:
    """Mean over the modules of a cell that were kept, None if all were dropped; and the same in words."""
    cell: dict[str, Any] = {"block": place.block, "kind": place.kind, "mean": None}
    kept = [measure(module) for module in modules if module.rank[1]]
    if not kept:
        return cell | {"told": f"{place.block}, {place.kind}: dropped"}
    mean = sum(kept) / len(kept)
    of = f" {unit}" if unit else f" of {sum(module.rank[0] for module in modules) / len(modules):.4g}"
    many = f", mean of {len(kept)} modules" if len(modules) > 1 else ""
    gone = f", {len(modules) - len(kept)} dropped" if len(kept) < len(modules) else ""
    return cell | {"mean": mean, "told": f"{place.block}, {place.kind}: {mean:.4g}{of}{many}{gone}"}
