"""Charts as inline SVG, drawn by Vega-Lite: pages need no script for them, and their colours are those of page.css."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from ..errors import MissingPackageError
from ..text import as_html, shortened, visible
from .drawing import DrawingError, draw

__all__ = ["BYTES", "DESCRIBED", "chart", "size_text"]

_TEXT = {"labelFont": "inherit", "titleFont": "inherit", "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
_SOFT = {"labelColor": "var(--soft)", "titleColor": "var(--soft)"}
_CONFIG = {
    "background": None,
    "padding": 2,
    "view": {"stroke": None},
    "axis": {**_TEXT, **_SOFT, "aria": False, "domain": False, "ticks": False, "gridColor": "var(--line)", "labelPadding": 6},
    "legend": {**_TEXT, **_SOFT, "aria": False, "orient": "top"},
    "title": {"font": "inherit", "fontSize": 12, "fontWeight": "normal", "color": "var(--soft)", "anchor": "start"}
    | {"subtitleFont": "inherit", "subtitleFontSize": 12, "subtitleColor": "var(--soft)", "limit": 300, "offset": 8},
    "text": {"font": "inherit", "fontSize": 12, "fill": "var(--text)"},
    "line": {"stroke": "var(--accent)", "strokeWidth": 2},
    "area": {"fill": "var(--band)"},
    "point": {"filled": True, "size": 30, "opacity": 1, "fill": "var(--accent)"},
    "rule": {"stroke": "var(--warm)", "strokeDash": [5, 4]},
}
_HEAD = re.compile(r'<svg [^>]*?width="([\d.]+)" height="([\d.]+)" viewBox="([^"]*)">')
_MARK = re.compile(r'<(\w+) aria-label="([^"]*)"([^>]*)/>')

_LONGEST = 300  # characters of a text in a chart: fitting one of 100,000 into a label takes minutes

DESCRIBED = {"description": {"field": "told"}}  # of an encoding
BYTES = {"labelExpr": "format(datum.value, '~s') + 'B'"}  # of an axis


def chart(label: str, spec: Mapping[str, Any], *, fluid: bool = True) -> str:
    """Draw a specification of Vega-Lite (https://vega.github.io/vega-lite/docs/spec.html).

    Marks tell what the `told` of their data says where a pointer rests on them, if their encoding has DESCRIBED.

    A chart that cannot be drawn becomes a sentence that says so.

    Args:
        label: what is drawn, for those who cannot see it.
        spec: without schema and config; colours are variables of page.css.
        fluid: as wide as its figure; otherwise as wide as the specification says.

    Raises:
        MissingPackageError: vl-convert-python is not installed.
    """
    if importlib.util.find_spec("vl_convert") is None:
        raise MissingPackageError("charts need the package vl-convert-python: pip install vl-convert-python")
    try:
        drawn = draw(_clean({"config": _CONFIG, **spec}))
    except DrawingError as error:
        return f'<p class="undrawn">This chart could not be drawn ({as_html(error)}): {as_html(label)}.</p>'
    size = "" if fluid else r' width="\1" height="\2"'
    style = "wide" if fluid else "fixed"
    drawn = _HEAD.sub(rf'<svg class="{style}" role="img" aria-label="{_literal(label)}" viewBox="\3"{size}>', drawn, count=1)
    return _MARK.sub(r"<\1\3><title>\2</title></\1>", drawn)


def size_text(size: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 999.5 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def _clean(value: Any) -> Any:
    """A specification whose texts hold only what can be drawn."""
    if isinstance(value, str):
        return visible(shortened(value, _LONGEST))
    if isinstance(value, Mapping):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value


def _literal(text: str) -> str:
    return as_html(text).replace("\\", r"\\")
