"""Strategy dynamic: integers with a scale of least squared error for each group of weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .codecs import Codec
from .fixed_width import FixedWidth
from .grids import choose_mse_scale, integer_levels, integer_steps, quantize_integer
from .packing import WIDTHS

__all__ = ["DYNAMIC", "INTEGERS", "INTEGER_GROUP_SIZES"]

INTEGER_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)


def _integer(bits: int) -> Codec:
    def choose_scale(blocks: Tensor, dtype: torch.dtype) -> Tensor:
        return choose_mse_scale(blocks, bits, dtype)

    quantize, nearest = partial(quantize_integer, bits=bits), partial(integer_steps, bits=bits)
    return Codec(f"int{bits}", bits, tuple(integer_levels(bits)), choose_scale, quantize, nearest)


INTEGERS = {bits: _integer(bits) for bits in WIDTHS}
DYNAMIC = FixedWidth("dynamic", INTEGERS, INTEGER_GROUP_SIZES, needs_bits=False, off_at_16=True)
