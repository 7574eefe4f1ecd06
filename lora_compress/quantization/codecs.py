"""The codecs by name: how the rows of a factor become codes and scales, and rows again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import (
    NF4_LEVELS,
    choose_absmax,
    choose_mse_scale,
    choose_static_scale,
    from_blocks,
    integer_levels,
    quantize_integer,
    quantize_nf4,
    to_blocks,
)

__all__ = ["CODECS", "Codec", "codec_by_id"]


@dataclass(frozen=True)
class Codec:
    """A fixed-width code: each weight is levels[code] * scale of its block.

    Args:
        id: its number in packed files.
        name: its name in settings and reports.
        bits: bits per code.
        levels: the 2^bits values that codes stand for, times the scale.
        choose_scale: blocks (r, b, g) to scales (r, b), for strategies that look at the data alone.
        quantize: blocks (r, b, g) and scales (r, b) to codes (r, b, g).
    """

    id: int
    name: str
    bits: int
    levels: tuple[float, ...]
    choose_scale: Callable[[Tensor], Tensor]
    quantize: Callable[[Tensor, Tensor], Tensor]

    def encode(self, rows: Tensor, block_size: int | None, static_scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Quantize rows (r, n) to codes (r, n), uint8, and scales (r, b), bfloat16.

        `static_scale` is the scale of strategy static (integer codecs; `block_size` must be None).
        """
        blocks = to_blocks(rows.float(), block_size)
        scales = self.choose_scale(blocks) if static_scale is None else choose_static_scale(blocks, self.bits, static_scale)
        return from_blocks(self.quantize(blocks, scales), rows.shape[1]), scales.to(torch.bfloat16)

    def decode(self, codes: Tensor, scales: Tensor, block_size: int | None) -> Tensor:
        """Weights (r, n), float32, of codes (r, n) and scales (r, b)."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device=codes.device)
        blocks = to_blocks(levels[codes.int()], block_size)
        return from_blocks(blocks * scales.float().unsqueeze(2), codes.shape[1])


def _integer(id: int, bits: int) -> Codec:
    return Codec(
        id,
        f"int{bits}",
        bits,
        tuple(integer_levels(bits)),
        lambda blocks: choose_mse_scale(blocks, bits),
        lambda blocks, scales: quantize_integer(blocks, scales, bits),
    )


CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (_integer(1, 8), _integer(2, 4), Codec(3, "nf4", 4, NF4_LEVELS, choose_absmax, quantize_nf4))
}


def codec_by_id(number: int) -> Codec | None:
    """The codec that a packed file names by `number`, None where this version has none of that number."""
    return next((codec for codec in CODECS.values() if codec.id == number), None)
