"""Strategy nf4: the 4-bit levels of QLoRA, so that bitsandbytes decodes the same weights from the same codes."""

from __future__ import annotations

from .codecs import codec_of_levels
from .fixed_width import FixedWidth

__all__ = ["NF4", "NF4_LEVELS"]

# Quantiles of a standard normal, scaled to [-1, 1]: QLoRA (arXiv 2305.14314), the values of bitsandbytes' kernels.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

NF4 = FixedWidth("nf4", {4: codec_of_levels("nf4", NF4_LEVELS)}, group_sizes=(32, 64, 128, 256), at_other_bits="dynamic")
