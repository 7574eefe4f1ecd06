"""The codecs by name: how the rows of a factor become codes and scales, and rows again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .grids import choose_absmax, choose_static_scale, from_blocks, quantize_to_levels, to_blocks
from .packing import WIDTHS, look_up, split_words, word_table

__all__ = ["CODECS", "Codec", "codec_of_levels"]

_CHUNK = 1 << 17  # weights that are worked on at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class Codec:
    """A fixed-width code: each weight is levels[code] * scale of its block.

    Args:
        name: its name in the index of packed files.
        bits: bits per code.
        levels: the 2^bits values that codes stand for, times the scale; NaN for a code that is not used.
        choose_scale: blocks (r, b, g) and the dtype of stored scales to scales (r, b), for strategies that look at the data alone.
        quantize: blocks (r, b, g) and scales (r, b) to codes (r, b, g).
        nearest: the same to the levels of these codes, float32, where that can be had without the codes; training calls it at
            every step.
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    choose_scale: Callable[[Tensor, torch.dtype], Tensor]
    quantize: Callable[[Tensor, Tensor], Tensor]
    nearest: Callable[[Tensor, Tensor], Tensor] | None = None

    @functools.cached_property
    def reach(self) -> float:
        """The largest magnitude of a level."""
        return max(abs(level) for level in self.levels if not math.isnan(level))

    @functools.cached_property
    def has_unused_codes(self) -> bool:
        """Whether some codes stand for no number."""
        return any(map(math.isnan, self.levels))

    @functools.cached_property
    def _word_table(self) -> npt.NDArray[np.generic]:
        return word_table(np.array(self.levels, np.float32), self.bits)

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
            found = look_up(split_words(packed[piece], self.bits), self._word_table)
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


def codec_of_levels(name: str, levels: Sequence[float]) -> Codec:
    """Return a codec with the given levels, whose scale is the largest magnitude of a block.

    Args:
        name: in the index of packed files.
        levels: (2^bits,), rising, for 2, 3, 4, 5, 6 or 8 bits; the largest magnitude is usually 1.

    Raises:
        ValueError: there are not so many levels, or they do not rise.
    """
    bits = (len(levels) - 1).bit_length()
    if bits not in WIDTHS or len(levels) != 1 << bits or list(levels) != sorted(set(levels)):
        raise ValueError(f"codec {name}: {len(levels)} levels: 2^bits rising ones are needed, bits {', '.join(map(str, WIDTHS))}")
    return Codec(name, bits, tuple(levels), choose_absmax, functools.partial(quantize_to_levels, levels=tuple(levels)))


CODECS: dict[str, Codec] = {}  # by name; `registry` fills it with the codecs of each strategy
