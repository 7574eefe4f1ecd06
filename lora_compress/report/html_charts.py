"""What the page of a compressed file draws: bytes before and after, the size-error curve, spectra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..text import as_html
from .charts import BYTES, DESCRIBED, chart, size_text
from .file_report import FileReport, ModuleReport
from .html_blocks import place_of

__all__ = ["bytes_chart", "curve_chart", "spectrum_overview", "worst_spectra"]

_COLOURS = 5  # --p0 to --p4 in page.css
_REST = "header and other tensors"
_FLOOR = 1e-6  # of singular values, relative to the largest
_WORST = 6


def bytes_chart(report: FileReport) -> str:
    """Two bars, input and output, each divided by the parts of the model, and the same in numbers."""
    sizes: dict[str, tuple[int, int]] = {}
    for module in report.modules:
        before, after = sizes.get(module.part, (0, 0))
        sizes[module.part] = before + module.bytes[0], after + module.bytes[1]
    styles = {part: f"p{index % _COLOURS}" for index, part in enumerate(sizes)} | {_REST: "rest"}
    before, after = (max(report.bytes[side] - sum(pair[side] for pair in sizes.values()), 0) for side in (0, 1))
    sizes[_REST] = before, after
    titles = "input", "output" if report.status == "written" else "not written"
    rows = [
        {"file": f"{title}, {size_text(report.bytes[side])}", "bytes": pair[side], "part": part, "order": order}
        | {"told": f"{part}: {size_text(pair[side])}"}
        for side, title in enumerate(titles)
        for order, (part, pair) in enumerate(sizes.items())
    ]
    colours = {"domain": list(styles), "range": [f"var(--{style})" for style in styles.values()]}
    drawing = chart(
        f"bytes of input and output: {' and '.join(map(size_text, report.bytes))}",
        {
            "width": 340,
            "height": {"step": 40},
            "data": {"values": rows},
            "mark": {"type": "bar", "size": 26},
            "encoding": {
                "y": {"field": "file", "type": "nominal", "sort": None, "title": None},
                "x": {"field": "bytes", "type": "quantitative", "title": None, "axis": {**BYTES, "tickCount": 5}},
                "color": {"field": "part", "type": "nominal", "scale": colours, "legend": None},
                "order": {"field": "order"},
                **DESCRIBED,
            },
        },
    )
    lines = "".join(
        f'<tr><th><span class="key"><i class="{styles[part]}"></i>{as_html(part)}</span></th><td>{size_text(before)}</td>'
        f"<td>{size_text(after)}</td><td>{f'{after / before:.1%}' if before else '–'}</td></tr>"
        for part, (before, after) in sizes.items()
    )
    head = f"<thead><tr><th></th><td>{titles[0]}</td><td>{titles[1]}</td><td>share kept</td></tr></thead>"
    table = f'<table class="bytes">{head}{lines}</table>'
    return f"<figure><figcaption>Bytes before and after</figcaption>{drawing}{table}</figure>"


def curve_chart(report: FileReport) -> str:
    """Relative error against bytes: what other sizes of this file would lose, and the size that was chosen."""
    caption = '<figcaption>Size and error <span class="unit">other sizes of this file, and the one chosen</span></figcaption>'
    points = sorted((size, error) for size, error in report.curve if size > 0 and math.isfinite(error))
    if not points:
        return f"<figure>{caption}<p>No other sizes were computed for this file.</p></figure>"
    here = report.bytes[1], report.relative_error
    chosen = [here] if here[0] and math.isfinite(here[1]) else []
    sizes = [size for size, _ in (*points, *chosen)]
    decades = range(math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes))) + 1)
    ticks = [factor * 10**decade for decade in decades for factor in (1, 2, 5) if min(sizes) <= factor * 10**decade <= max(sizes)]
    x = {"field": "bytes", "type": "quantitative", "scale": {"type": "log", "nice": False, "padding": 24}}
    x |= {"title": "size of the file (logarithmic)", "axis": {**BYTES, "values": ticks}}
    y = {"field": "error", "type": "quantitative", "title": "relative error", "axis": {"format": "~%", "tickCount": 5}}
    right = bool(chosen) and here[0] ** 2 > points[0][0] * points[-1][0]  # its label goes under the curve, else above it
    label = {
        "type": "text",
        "fontWeight": 650,
        "align": "right" if right else "left",
        "dx": -10 if right else 10,
        "dy": 16 if right else -10,
    }
    spec = {
        "width": 390,
        "height": 210,
        "encoding": {"x": x, "y": y, **DESCRIBED},
        "layer": [
            {"data": {"values": _sizes(points)}, "mark": {"type": "line", "point": True, "aria": True}},
            {"data": {"values": _sizes(chosen)}, "mark": {"type": "point", "size": 120, "fill": "var(--warm)"}},
            {"data": {"values": _sizes(chosen)}, "mark": label, "encoding": {"text": {"field": "told"}}},
        ],
    }
    return f"<figure>{caption}{chart('relative error against size of the file', spec)}</figure>"


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


def worst_spectra(modules: Sequence[ModuleReport]) -> str:
    """Singular values of the modules that the largest shares of the file's squared error are in; hollow ones were dropped."""
    found = sorted((m for m in modules if m.squared_error > 0 and any(m.sigma)), key=lambda m: m.squared_error, reverse=True)
    if not found:
        return ""
    total = sum(module.squared_error for module in modules)
    drawn = "".join(_spectrum(module, module.squared_error / total) for module in found[:_WORST])
    caption = '<figcaption>Where most is lost <span class="unit">singular values; hollow: dropped</span></figcaption>'
    return f'<figure id="worst">{caption}<div class="multiples">{drawn}</div></figure>'


def _sizes(points: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    return [{"bytes": size, "error": error, "told": f"{size_text(size)}, {error:.2%}"} for size, error in points]


def _overview(part: str, modules: list[ModuleReport]) -> str:
    length = max(len(module.sigma) for module in modules)
    bands = [_quantiles([max(m.sigma[i] / m.sigma[0], _FLOOR) for m in modules if i < len(m.sigma)]) for i in range(length)]
    rows = [{"i": i, "low": low, "middle": middle, "high": high} for i, (low, middle, high) in enumerate(bands, 1)]
    kept = sum(module.rank[1] for module in modules) / len(modules)
    mark = [{"i": min(max(kept, 1), length), "told": f"{kept:.1f} kept"}] if kept else []
    y = _logarithmic("σᵢ / σ₁", [1.0, min(band[0] for band in bands)])
    spec = {
        **_panel(f"{part} ({len(modules)} modules)"),
        "encoding": {"x": _components(length)},
        "layer": [
            {"data": {"values": rows}, "mark": "area", "encoding": {"y": {"field": "low", **y}, "y2": {"field": "high"}}},
            {"data": {"values": rows}, "mark": "line", "encoding": {"y": {"field": "middle", **y}}},
            {"data": {"values": mark}, "mark": "rule", "encoding": DESCRIBED},
        ],
    }
    return chart(f"spectra of {part}", spec)


def _spectrum(module: ModuleReport, share: float) -> str:
    kept = module.rank[1]
    rows: list[dict[str, Any]] = [
        {"i": i, "sigma": value, "kept": i <= kept, "told": f"σ {i} = {value:.4g}{'' if i <= kept else ', dropped'}"}
        for i, value in enumerate(module.sigma, 1)
        if value > _FLOOR * module.sigma[0]
    ]
    place = place_of(module.name)
    colour = {"field": "kept", "scale": {"domain": [True, False], "range": ["var(--accent)", "transparent"]}, "legend": None}
    spec = {
        **_panel(f"{place.block}, {place.kind}", f"{kept} of {module.rank[0]} kept, {share:.1%} of what is lost"),
        "data": {"values": rows},
        "mark": {"type": "point", "stroke": "var(--accent)"},
        "encoding": {
            "x": _components(len(module.sigma)),
            "y": {"field": "sigma", **_logarithmic("σᵢ", [row["sigma"] for row in rows])},
            "fill": colour,
            **DESCRIBED,
        },
    }
    return chart(f"spectrum of {module.name}", spec)


def _panel(*title: str) -> dict[str, Any]:
    return {"width": 250, "height": 130, "title": dict(zip(("text", "subtitle"), title, strict=False))}


def _logarithmic(title: str, values: Sequence[float]) -> dict[str, Any]:
    """A channel with a line of the grid for each power of ten."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    low -= low == high
    lines = [10.0**power for power in range(low, high + 1, -(-(high - low) // 5))]
    scale = {"type": "log", "domain": [10.0**low, 10.0**high]}
    return {"type": "quantitative", "title": title, "scale": scale, "axis": {"values": lines, "format": "~g"}}


def _components(length: int) -> dict[str, Any]:
    ticks = {"tickMinStep": 1, "tickCount": 6, "format": "d", "grid": False}
    return {"field": "i", "type": "quantitative", "title": "component i", "scale": {"domain": [1, max(length, 2)]}, "axis": ticks}


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    low, middle, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9))
    return low, middle, high
