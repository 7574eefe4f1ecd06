"""The codecs by name: how the rows of a factor become codes and scales, and rows again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .grids import (
    NF4_LEVELS,
    choose_absmax,
    choose_fp8_scale,
    choose_mse_scale,
    choose_static_scale,
    fp8_levels,
    from_blocks,
    integer_levels,
    quantize_fp8,
    quantize_integer,
    quantize_nf4,
    to_blocks,
)
from .packing import look_up, split_words, word_table

__all__ = ["CODECS", "Codec", "codec_by_id"]

_CHUNK = 1 << 17  # weights that are worked on at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class Codec:
    """A fixed-width code: each weight is levels[code] * scale of its block.

    Args:
        id: its number in packed files.
        name: its name in settings and reports.
        bits: bits per code.
        levels: the 2^bits values that codes stand for, times the scale; NaN for a code that is not used.
        choose_scale: blocks (r, b, g) and the dtype of stored scales to scales (r, b), for strategies that look at the data alone.
        quantize: blocks (r, b, g) and scales (r, b) to codes (r, b, g).
    """

    id: int
    name: str
    bits: int
    levels: tuple[float, ...]
    choose_scale: Callable[[Tensor, torch.dtype], Tensor]
    quantize: Callable[[Tensor, Tensor], Tensor]

    @functools.cached_property
    def reach(self) -> float:
        """The largest magnitude of a level."""
        return max(abs(level) for level in self.levels if not math.isnan(level))

    def encode(
        self,
        rows: Tensor,
        block_size: int | None,
        static_scale: float | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
        scales: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Quantize rows (r, n) to codes (r, n), uint8, and scales (r, b), `scale_dtype`.

        `static_scale` is the scale of strategy static (integer codecs; `block_size` must be None). `scales: (r, b)` are taken
        as they are where given, such as those that training ended with.
        """
        results = []
        size = max(1, _CHUNK // max(rows.shape[1], 1))
        for start in range(0, max(len(rows), 1), size):
            blocks = to_blocks(rows[start : start + size].float(), block_size)
            if scales is not None:
                chosen = scales[start : start + size].to(scale_dtype).float()
            elif static_scale is not None:
                chosen = choose_static_scale(blocks, self.bits, static_scale, scale_dtype)
            else:
                chosen = self.choose_scale(blocks, scale_dtype)
            results.append((from_blocks(self.quantize(blocks, chosen), rows.shape[1]), _stored(chosen, scale_dtype)))
        codes, stored = zip(*results, strict=True)
        return torch.cat(codes), torch.cat(stored)

    def decode(self, codes: Tensor, scales: Tensor, block_size: int | None) -> Tensor:
        """Weights (r, n), float32, of codes (r, n) and scales (r, b)."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device=codes.device)
        blocks = to_blocks(levels[codes.int()], block_size)
        return from_blocks(blocks * scales.float().unsqueeze(2), codes.shape[1])

    def decode_packed(self, packed: npt.NDArray[np.uint8], scales: Tensor, block_size: int | None, out: Tensor) -> None:
        """Fill `out: (r, n)` with the weights of packed codes (r, packed_width(n)) and scales (r, b), float32.

        A weight is the float32 product level * scale, rounded to the dtype of `out`.
        """
        count = out.shape[1]
        size = max(1, _CHUNK // max(count, 1))
        for start in range(0, len(out), size):
            piece = slice(start, start + size)
            found = look_up(split_words(packed[piece], self.bits), _level_table(self.name))
            _scale_into(torch.from_numpy(found)[:, :count], scales[piece], block_size, out[piece])


def _scale_into(levels: Tensor, scales: Tensor, block_size: int | None, out: Tensor) -> None:
    """out = levels * the scale of their block; blocks in full length first, then the short one at the end."""
    rows, count = out.shape
    block = min(block_size or count, count)
    full = count // block
    if full * block == count and levels.is_contiguous():
        torch.mul(levels.view(rows, full, block), scales.unsqueeze(2), out=out.view(rows, full, block))
        return
    blocks, target = levels[:, : full * block].unflatten(1, (full, block)), out[:, : full * block].unflatten(1, (full, block))
    torch.mul(blocks, scales[:, :full].unsqueeze(2), out=target)
    if full * block < count:
        torch.mul(levels[:, full * block :], scales[:, full:], out=out[:, full * block :])


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return scales.clamp(-largest, largest).to(dtype)


@functools.cache
def _level_table(name: str) -> npt.NDArray[np.generic]:
    codec = CODECS[name]
    return word_table(np.array(codec.levels, np.float32), codec.bits)


def _integer(id: int, bits: int) -> Codec:
    return Codec(
        id,
        f"int{bits}",
        bits,
        tuple(integer_levels(bits)),
        lambda blocks, dtype: choose_mse_scale(blocks, bits, dtype),
        lambda blocks, scales: quantize_integer(blocks, scales, bits),
    )


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _integer(1, 8),
        _integer(2, 4),
        Codec(3, "nf4", 4, NF4_LEVELS, choose_absmax, quantize_nf4),
        _integer(4, 2),
        _integer(5, 3),
        _integer(6, 5),
        _integer(7, 6),
        Codec(8, "fp8", 8, fp8_levels(), choose_fp8_scale, quantize_fp8),
    )
}


def codec_by_id(number: int) -> Codec | None:
    """The codec that a packed file names by `number`, None where this version has none of that number."""
    return next((codec for codec in CODECS.values() if codec.id == number), None)
