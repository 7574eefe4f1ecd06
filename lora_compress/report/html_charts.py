"""Charts of a compressed file as inline SVG: bytes before and after, the size-error curve, an overview of spectra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .file_report import FileReport, ModuleReport

__all__ = [
    "bytes_chart",
    "curve_chart",
    "horizontal_line",
    "linear_ticks",
    "path_through",
    "size_text",
    "spectrum_overview",
    "svg",
]

_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 14, 44
_COLOURS = 5  # .p0 to .p4 in page.css
_REST = "header and other tensors"


def bytes_chart(report: FileReport) -> str:
    """Two bars, input and output, each divided by the parts of the model, and the same in numbers."""
    sizes: dict[str, tuple[int, int]] = {}
    for module in report.modules:
        before, after = sizes.get(module.part, (0, 0))
        sizes[module.part] = before + module.bytes[0], after + module.bytes[1]
    styles = {part: f"p{index % _COLOURS}" for index, part in enumerate(sizes)} | {_REST: "rest"}
    before, after = (max(report.bytes[side] - sum(pair[side] for pair in sizes.values()), 0) for side in (0, 1))
    sizes[_REST] = before, after
    titles = "input", "output" if report.status == "written" else "result, not written"
    shapes, scale = [], (_WIDTH - 20) / max(*report.bytes, 1)
    for side, title in enumerate(titles):
        y, x = 26 + side * 66, 10.0
        total = f'<tspan class="strong">{size_text(report.bytes[side])}</tspan>'
        shapes.append(f'<text x="10" y="{y - 8}" class="lab">{title}: {total}</text>')
        for part, pair in sizes.items():
            wide = pair[side] * scale
            box = f'x="{x:.1f}" y="{y}" width="{max(wide - 1, 0.5):.1f}" height="28"'
            shapes.append(f'<rect class="{styles[part]}" {box}><title>{escape(part)}: {size_text(pair[side])}</title></rect>')
            x += wide
    rows = "".join(
        f'<tr><th><span class="key"><i class="{styles[part]}"></i>{escape(part)}</span></th><td>{size_text(before)}</td>'
        f"<td>{size_text(after)}</td><td>{f'{after / before:.1%}' if before else '–'}</td></tr>"
        for part, (before, after) in sizes.items()
    )
    head = f"<thead><tr><th></th><td>{titles[0]}</td><td>{titles[1]}</td><td>share kept</td></tr></thead>"
    table = f'<table class="bytes">{head}{rows}</table>'
    drawing = svg(f"bytes of input and output: {' and '.join(map(size_text, report.bytes))}", shapes, 126)
    return f"<figure><figcaption>Bytes before and after</figcaption>{drawing}{table}</figure>"


def curve_chart(report: FileReport) -> str:
    """Relative error against bytes: what other sizes of this file would lose, and the size that was chosen."""
    caption = '<figcaption>Size and error <span class="unit">other sizes of this file, and the one chosen</span></figcaption>'
    points = sorted((size, error) for size, error in report.curve if size > 0 and math.isfinite(error))
    if not points:
        return f"<figure>{caption}<p>No other sizes were computed for this file.</p></figure>"
    chosen = [(report.bytes[1], report.relative_error)] if report.bytes[1] and math.isfinite(report.relative_error) else []
    sizes, errors = zip(*points, *chosen, strict=True)
    low, high = min(sizes) / 1.15, max(sizes) * 1.15
    top = max(*errors, 1e-6) * 1.08

    def place(size: float, error: float) -> tuple[float, float]:
        x = _LEFT + math.log(size / low) / math.log(high / low) * (_WIDTH - _LEFT - _RIGHT)
        return x, _TOP + (1 - error / top) * (_HEIGHT - _TOP - _BOTTOM)

    shapes = [horizontal_line(place(low, value)[1], f"{100 * value:.3g}%") for value in linear_ticks(top)]
    shapes += [_vertical(place(value, 0)[0], size_text(value)) for value in _log_ticks(low, high)]
    shapes.append(f'<path class="line" d="{path_through([place(*point) for point in points])}"/>')
    for size, error in points:
        x, y = place(size, error)
        shapes.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{size_text(size)}: {error:.2%}</title></circle>')
    for size, error in chosen:
        x, y = place(size, error)
        anchor, shift = ("end", -11) if x > _WIDTH * 0.6 else ("start", 11)
        above = y - 10 if y > _TOP + 24 else y + 22
        shapes.append(f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        label = f'class="strong halo" text-anchor="{anchor}" x="{x + shift:.1f}" y="{above:.1f}"'
        shapes.append(f"<text {label}>{size_text(size)}, {error:.2%}</text>")
    shapes += _axis_titles("size of the file (logarithmic)", "relative error")
    return f"<figure>{caption}{svg('relative error against size of the file', shapes)}</figure>"


def spectrum_overview(modules: Sequence[ModuleReport]) -> str:
    """For each part of the model the middle 80 % of the spectra sigma_i / sigma_1, their median and the mean rank kept."""
    parts: dict[str, list[ModuleReport]] = {}
    for module in modules:
        if module.sigma and module.sigma[0] > 0.0:
            parts.setdefault(module.part, []).append(module)
    caption = (
        '<figcaption>All modules <span class="unit">singular values relative to the largest: median and middle 80 %; '
        "dashed: mean rank kept</span></figcaption>"
    )
    return f'<figure>{caption}<div class="multiples">{"".join(_overview(part, own) for part, own in parts.items())}</div></figure>'


def size_text(size: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 999.5 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def _overview(part: str, modules: list[ModuleReport]) -> str:
    width, height, left, bottom, top = 300, 190, 58, 38, 24
    length = max(len(module.sigma) for module in modules)
    bands = [_quantiles([m.sigma[i] / m.sigma[0] for m in modules if i < len(m.sigma)]) for i in range(length)]
    floor = max(min(band[0] for band in bands), 1e-6)
    low = min(math.floor(math.log10(floor)), -1)

    def place(index: float, value: float) -> tuple[float, float]:
        x = left + (index - 1) / max(length - 1, 1) * (width - left - 12)
        share = math.log10(max(value, 10.0**low)) / low
        return x, top + share * (height - top - bottom)

    shapes = [f'<text x="{left}" y="12" class="lab">{escape(part)} ({len(modules)} modules)</text>']
    for power in range(0, low - 1, min(-1, -round(-low / 4))):
        shapes.append(
            horizontal_line(place(1, 10.0**power)[1], f"{10.0**power:g}" if power > -4 else f"1e{power}", left, width - 12)
        )
    edge = [place(i + 1, band[2]) for i, band in enumerate(bands)] + [place(i + 1, band[0]) for i, band in enumerate(bands)][::-1]
    shapes.append(f'<path class="band" d="{path_through(edge)}Z"/>')
    shapes.append(f'<path class="line" d="{path_through([place(i + 1, band[1]) for i, band in enumerate(bands)])}"/>')
    kept = sum(module.rank[1] for module in modules) / len(modules)
    if kept:
        x = place(min(max(kept, 1), length), 1)[0]
        shapes.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"><title>{kept:.1f} kept</title></line>'
        )
    for index in sorted({1, length, *([max(round(length / 2), 1)] if length > 8 else [])}):
        x = place(index, 1)[0]
        shapes.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{height - bottom + 15}">{index}</text>')
    middle = (left + width - 12) / 2
    shapes.append(f'<text class="axis" text-anchor="middle" x="{middle}" y="{height - 6}">component i</text>')
    turned = f"translate(11 {(top + height - bottom) / 2}) rotate(-90)"
    shapes.append(f'<text class="axis" text-anchor="middle" transform="{turned}">σᵢ / σ₁</text>')
    return svg(f"spectra of {part}", shapes, height, width)


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    low, middle, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9))
    return low, middle, high


def svg(label: str, shapes: Sequence[str], height: int = _HEIGHT, width: int = _WIDTH) -> str:
    """An inline drawing of SVG elements, with a label for those who cannot see it."""
    style = ' class="wide"' if width == _WIDTH else ""
    return f'<svg{style} role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}">{"".join(shapes)}</svg>'


def path_through(points: Sequence[tuple[float, float]]) -> str:
    """What the attribute d of a path says."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def horizontal_line(y: float, text: str, left: int = _LEFT, right: int = _WIDTH - _RIGHT) -> str:
    """A line of the grid with its label."""
    return (
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{left - 6}" y="{y + 4:.1f}">{text}</text>'
    )


def _vertical(x: float, text: str) -> str:
    base = _HEIGHT - _BOTTOM
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base}"/>'
        f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{base + 16}">{text}</text>'
    )


def _axis_titles(horizontal: str, vertical: str) -> list[str]:
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    return [
        f'<text class="axis" text-anchor="middle" x="{middle_x}" y="{_HEIGHT - 8}">{horizontal}</text>',
        f'<text class="axis" text-anchor="middle" transform="translate(12 {middle_y}) rotate(-90)">{vertical}</text>',
    ]


def linear_ticks(top: float) -> list[float]:
    """About five round values from 0 to `top`."""
    step = 10.0 ** math.floor(math.log10(top / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if top / (step * factor) <= 5.5)
    return [index * step for index in range(int(top / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values between `low` and `high`, at most seven."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors if low <= factor * 10.0**exponent <= high]
        if len(ticks) <= 7:
            break
    return ticks if len(ticks) > 1 else [low, high]
