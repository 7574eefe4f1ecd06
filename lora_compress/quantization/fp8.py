"""The codec fp8: e4m3 floats with a power of two for each group. No setting writes it; packed files that have it are read."""

from __future__ import annotations

from .codecs import Codec
from .grids import choose_fp8_scale, fp8_levels, quantize_fp8

__all__ = ["FP8_CODEC"]

FP8_CODEC = Codec("fp8", 8, fp8_levels(), choose_fp8_scale, quantize_fp8)
