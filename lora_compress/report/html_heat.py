"""Heat maps of a compressed file: blocks of the model from left to right, kinds of layers from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from .file_report import ModuleReport
from .html_blocks import Place, place_of

__all__ = ["heat_maps"]

_STEPS = 9  # of the colour ramp, .h0 to .h8 in page.css
_CELL, _GAP = (13, 19), 2  # smallest and largest cell, pixels
_WIDTH = 1090  # of the page inside its margins
_LABEL_CHARACTER = 6.4  # pixels of the 11 px labels
_FLAT = 0.01  # a map whose values differ by less says nothing

Measure = Callable[[ModuleReport], float]
Cell = tuple[Place, list[ModuleReport]]
Value = tuple[float | None, str]


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
    caption = f'<figcaption>{escape(part)}: {title} <span class="unit">mean of the modules in a cell</span></figcaption>'
    if not kept:
        return f"<p><b>{escape(part)}: {title}</b>: every module was dropped.</p>"
    low, high = min(kept), max(kept)
    if high - low <= _FLAT * high and not dropped:
        return f"<p><b>{escape(part)}: {title}</b>: {high:.4g} {unit} in every module.</p>"
    label = escape(f"{part}: {title} by block and kind of layer")
    drawing = _draw(_cells(modules), lambda own: _value(own, measure, unit), (low, high), label)
    return f'<figure>{caption}{_legend(low, high, unit, dropped)}<div class="scroll-x">{drawing}</div></figure>'


def _draw(cells: Sequence[Cell], value: Callable[[list[ModuleReport]], Value], bounds: tuple[float, float], label: str) -> str:
    blocks = sorted({place.order: place.block for place, _ in cells}.items())
    columns = {block: index for index, (_, block) in enumerate(blocks)}
    kinds = {kind: index for index, kind in enumerate(_kinds(cells))}
    left = max(len(kind) for kind in kinds) * _LABEL_CHARACTER + 10
    cell = int(min(max((_WIDTH - left) / len(columns), _CELL[0]), _CELL[1]))
    shapes = []
    for place, own in cells:
        mean, text = value(own)
        x, y = left + columns[place.block] * cell, kinds[place.kind] * cell
        style = "gone" if mean is None else f"h{_step(mean, bounds)}"
        shapes.append(
            f'<rect class="{style}" x="{x:.0f}" y="{y}" width="{cell - _GAP}" height="{cell - _GAP}" rx="2">'
            f"<title>{escape(f'{place.block}, {place.kind}: {text}')}</title></rect>"
        )
    for kind, row in kinds.items():
        shapes.append(f'<text class="k" x="{left - 6:.0f}" y="{row * cell + cell / 2 + 3:.1f}">{escape(kind)}</text>')
    width, bottom = left + len(columns) * cell, len(kinds) * cell
    for block, column in columns.items():
        corner = f"{left + column * cell + cell / 2 + 3:.0f} {bottom + 4}"
        shapes.append(f'<text class="b" transform="translate({corner}) rotate(-90)">{escape(block)}</text>')
    height = bottom + max(len(block) for block in columns) * _LABEL_CHARACTER + 8
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg class="heat" role="img" aria-label="{label}" {size}>{"".join(shapes)}</svg>'


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


def _value(modules: list[ModuleReport], measure: Measure, unit: str) -> Value:
    """Mean over the modules of a cell that were kept, None if all were dropped; and the same in words."""
    kept = [measure(module) for module in modules if module.rank[1]]
    if not kept:
        return None, "dropped"
    mean = sum(kept) / len(kept)
    of = f" {unit}" if unit else f" of {sum(module.rank[0] for module in modules) / len(modules):.4g}"
    many = f", mean of {len(kept)} modules" if len(modules) > 1 else ""
    gone = f", {len(modules) - len(kept)} dropped" if len(kept) < len(modules) else ""
    return mean, f"{mean:.4g}{of}{many}{gone}"


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
