"""Strategy static: integers with one scale for each component, in proportion to the root mean square of its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .dynamic import INTEGERS
from .fixed import FixedFormat
from .fixed_width import FixedWidth
from .strategy import Options

__all__ = ["STATIC"]

_DEFAULT_SCALE = 0.0625


class _Static(FixedWidth):
    """step size = scale * RMS * 2^(8 - bits), at most the one of least squared error."""

    ungrouped = "one scale per component"
    defaults: Mapping[str, Any] = {"scale": _DEFAULT_SCALE}

    def stored_as(self, options: Options) -> FixedFormat:
        """Return how the rows of a module are stored: no groups."""
        return FixedFormat(self.codec_name(options), None, _DEFAULT_SCALE if options.scale is None else options.scale)

    def problems(self, options: Options) -> list[str]:
        """Return what is wrong with the scale."""
        if options.scale is None or 0.0 < options.scale < math.inf:
            return []
        return [f"scale={options.scale:g}: must be above 0 (0.0625 to 0.25 is usual)"]


STATIC = _Static("static", INTEGERS, group_sizes=(), off_at_16=True)
