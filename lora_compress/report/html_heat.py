"""Heat maps of a compressed file: blocks of the model from left to right, kinds of layers from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from .file_report import ModuleReport
from .html_blocks import Place, place_of

__all__ = ["heat_maps"]

_STEPS = 9  # of the colour ramp, .h0 to .h8 in page.css
_CELL, _GAP = 17, 2
_LABEL_CHARACTER = 6.4  # pixels of the 11 px labels
_FLAT = 0.01  # a map whose values differ by less says nothing

Measure = Callable[[ModuleReport], float]


def heat_maps(modules: Sequence[ModuleReport]) -> str:
    """Rank and bits per weight for each part of the model; a measure that is the same everywhere is said in a sentence."""
    parts: dict[str, list[ModuleReport]] = {}
    for module in modules:
        parts.setdefault(module.part, []).append(module)
    return "".join(
        _map(part, own, title, unit, measure)
        for part, own in parts.items()
        for title, unit, measure in (
            ("components kept", "", lambda module: float(module.rank[1])),
            ("bits per weight", "bit", lambda module: module.bits),
        )
    )


def _map(part: str, modules: Sequence[ModuleReport], title: str, unit: str, measure: Measure) -> str:
    kept = [measure(module) for module in modules if module.rank[1]]
    dropped = len(modules) - len(kept)
    caption = f'<figcaption>{escape(part)}: {title} <span class="unit">mean of the modules in a cell</span></figcaption>'
    if not kept:
        return f"<p><b>{escape(part)}: {title}</b>: every module was dropped.</p>"
    low, high = min(kept), max(kept)
    if high - low <= _FLAT * high and not dropped:
        return f"<p><b>{escape(part)}: {title}</b>: {high:.4g} {unit} in every module.</p>"
    cells = _cells(modules)
    blocks = sorted({place.order: place.block for place, _ in cells}.items())
    columns = {block: index for index, (_, block) in enumerate(blocks)}
    kinds = {kind: index for index, kind in enumerate(_kinds(cells))}
    left = max(len(kind) for kind in kinds) * _LABEL_CHARACTER + 10
    width, height = left + len(columns) * _CELL, len(kinds) * _CELL
    bottom = max(len(block) for block in columns) * _LABEL_CHARACTER + 8
    shapes = [
        _cell(place, own, measure, unit, (low, high), left + columns[place.block] * _CELL, kinds[place.kind] * _CELL)
        for place, own in cells
    ]
    shapes += [f'<text class="k" x="{left - 6:.0f}" y="{row * _CELL + 12}">{escape(kind)}</text>' for kind, row in kinds.items()]
    shapes += [
        f'<text class="b" transform="translate({left + column * _CELL + 11:.0f} {height + 4}) rotate(-90)">{escape(block)}</text>'
        for block, column in columns.items()
    ]
    size = f'width="{width:.0f}" height="{height + bottom:.0f}" viewBox="0 0 {width:.0f} {height + bottom:.0f}"'
    label = escape(f"{part}: {title} by block and kind of layer")
    drawing = f'<svg class="heat" role="img" aria-label="{label}" {size}>{"".join(shapes)}</svg>'
    return f'<figure>{caption}{_legend(low, high, unit, dropped)}<div class="scroll-x">{drawing}</div></figure>'


def _cells(modules: Sequence[ModuleReport]) -> list[tuple[Place, list[ModuleReport]]]:
    """Modules that share a block and a kind share a cell."""
    cells: dict[tuple[str, str], tuple[Place, list[ModuleReport]]] = {}
    for module in modules:
        place = place_of(module.name)
        cells.setdefault((place.block, place.kind), (place, []))[1].append(module)
    return list(cells.values())


def _kinds(cells: list[tuple[Place, list[ModuleReport]]]) -> list[str]:
    """Kinds by the first block that has them, then by name: those of one kind of block stand together."""
    first: dict[str, tuple[int, str]] = {}
    for place, _ in cells:
        key = (place.order[0], place.order[1])
        first[place.kind] = min(first.get(place.kind, key), key)
    return sorted(first, key=lambda kind: (first[kind], kind))


def _cell(
    place: Place, modules: list[ModuleReport], measure: Measure, unit: str, bounds: tuple[float, float], x: float, y: float
) -> str:
    kept = [measure(module) for module in modules if module.rank[1]]
    box = f'x="{x:.0f}" y="{y:.0f}" width="{_CELL - _GAP}" height="{_CELL - _GAP}" rx="2"'
    what = f"{place.block}, {place.kind}"
    if not kept:
        return f'<rect class="gone" {box}><title>{escape(what)}: dropped</title></rect>'
    mean = sum(kept) / len(kept)
    of = f" of {sum(m.rank[0] for m in modules) / len(modules):.4g}" if not unit else f" {unit}"
    many = f", mean of {len(modules)} modules" if len(modules) > 1 else ""
    gone = f", {len(modules) - len(kept)} dropped" if len(kept) < len(modules) else ""
    return f'<rect class="h{_step(mean, bounds)}" {box}><title>{escape(what)}: {mean:.4g}{of}{many}{gone}</title></rect>'


def _step(value: float, bounds: tuple[float, float]) -> int:
    low, high = bounds
    return min(int((value - low) / (high - low) * _STEPS), _STEPS - 1) if high > low else _STEPS // 2


def _legend(low: float, high: float, unit: str, dropped: int) -> str:
    boxes = "".join(f'<rect class="h{step}" x="{step * 22}" y="0" width="22" height="12"/>' for step in range(_STEPS))
    ramp = f'<svg width="{_STEPS * 22}" height="12" aria-hidden="true">{boxes}</svg>'
    gone = ""
    if dropped:
        box = '<svg width="14" height="14" aria-hidden="true"><rect class="gone" x="1" y="1" width="12" height="12"/></svg>'
        gone = f'<span class="key">{box}dropped ({dropped})</span>'
    return f'<div class="legend"><span>{low:.3g} {unit}</span>{ramp}<span>{high:.3g} {unit}</span>{gone}</div>'
