"""Charts as inline SVG, drawn by Vega-Lite: pages need no script for them, and their colours are those of page.css."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from ..errors import MissingPackageError

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

DESCRIBED = {"description": {"field": "told"}}  # of an encoding
BYTES = {"labelExpr": "format(datum.value, '~s') + 'B'"}  # of an axis


def chart(label: str, spec: Mapping[str, Any], *, fluid: bool = True) -> str:
    """Draw a specification of Vega-Lite (https://vega.github.io/vega-lite/docs/spec.html).

    Marks tell what the `told` of their data says where a pointer rests on them, if their encoding has DESCRIBED.

    Args:
        label: what is drawn, for those who cannot see it.
        spec: without schema and config; colours are variables of page.css.
        fluid: as wide as its figure; otherwise as wide as the specification says.

    Raises:
        MissingPackageError: vl-convert-python is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingPackageError("charts need the package vl-convert-python: pip install vl-convert-python") from error
    drawn: str = vl_convert.vegalite_to_svg({"config": _CONFIG, **spec})
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


def _literal(text: str) -> str:
    return escape(text).replace("\\", r"\\")
