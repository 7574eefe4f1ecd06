"""Codes of a few bits, packed into bytes row by row and back.

A row of codes is one string of bits: the first code first, each code from its highest bit to its lowest. The string is cut
into bytes in the same order, so the first code lies in the high bits of the first byte, and zero bits fill the last byte.
Two 4-bit codes thus share a byte in the order that bitsandbytes uses. A row always begins with a new byte.

Reading goes by words: the shortest run of bits that holds whole codes and spans two bytes at most. A table tells for each
word all its codes, or what they stand for, so that a look-up takes the place of shifting every code.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["WIDTHS", "look_up", "pack_bits", "packed_width", "split_words", "unpack_bits", "word_table"]

WIDTHS = (2, 3, 4, 5, 6, 8)
_WORD_BITS = {2: 8, 3: 12, 4: 8, 5: 10, 6: 12, 8: 8}
_ENTRIES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # a type of each size, to move entries whole


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes: ceil(count * bits / 8)."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (r, n), uint8 below 2^bits, into (r, packed_width(n)) bytes on the CPU.

    Raises:
        ValueError: `bits` is not one of WIDTHS.
    """
    _check(bits)
    if bits == 8:
        return codes.cpu()
    size = math.lcm(bits, 8) // 8  # bytes of a group: the shortest run that holds whole codes
    per_group = size * 8 // bits
    rows, count = codes.shape
    groups = torch.nn.functional.pad(codes.cpu(), (0, -count % per_group)).reshape(rows, -1, per_group).numpy()
    strings = np.zeros(groups.shape[:2], np.uint64)
    for place in range(per_group):
        strings |= groups[:, :, place].astype(np.uint64) << np.uint64(size * 8 - bits * (place + 1))
    in_order = strings.astype(">u8").view(np.uint8).reshape(rows, -1, 8)[:, :, 8 - size :]
    return torch.from_numpy(np.ascontiguousarray(in_order.reshape(rows, -1)[:, : packed_width(count, bits)]))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`: bytes (r, packed_width(count)) to codes (r, count), uint8, on the device of `packed`.

    Raises:
        ValueError: `bits` is not one of WIDTHS.
    """
    _check(bits)
    if bits == 8:
        return packed
    codes = look_up(split_words(packed.cpu().numpy(), bits), _code_table(bits))[:, :count]
    return torch.from_numpy(np.ascontiguousarray(codes)).to(packed.device)


def split_words(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.integer]:
    """Words (r, w) of packed rows: bytes where codes fill them, else runs of 10 or 12 bits as int64."""
    width = _WORD_BITS[bits]
    if width == 8:
        return packed
    size = math.lcm(width, 8) // 8
    padding = -packed.shape[1] % size
    groups = (np.pad(packed, ((0, 0), (0, padding))) if padding else packed).reshape(-1, size)
    whole = (groups.astype(np.float64) @ _place_values(size)).astype(np.int64)  # exact below 2^53, and faster than shifting bytes
    words = np.empty((len(whole), size * 8 // width), np.int64)
    first, *others = words.T
    np.right_shift(whole, size * 8 - width, out=first)
    for place, word in enumerate(others, 2):
        np.bitwise_and(whole >> size * 8 - place * width if place < words.shape[1] else whole, (1 << width) - 1, out=word)
    return words.reshape(len(packed), -1)


def word_table(levels: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.generic]:
    """What each word stands for, (2^word bits, codes of a word), given `levels: (2^bits,)`, what each code stands for."""
    width = _WORD_BITS[bits]
    shifts = np.arange(width - bits, -1, -bits)
    codes = (np.arange(1 << width)[:, None] >> shifts) & ((1 << bits) - 1)
    return np.ascontiguousarray(levels[codes])


def look_up(words: npt.NDArray[np.integer], table: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Entries of a `word_table` for words (r, w), one row of w * codes each."""
    entry = _ENTRIES[table.dtype.itemsize * table.shape[1]]
    return np.take(table.view(entry).ravel(), words, mode="clip").view(table.dtype)  # clip: words cannot lie outside


@functools.cache
def _place_values(size: int) -> npt.NDArray[np.float64]:
    """What each byte of a big-endian integer counts."""
    return np.array([256.0**power for power in range(size - 1, -1, -1)])


@functools.cache
def _code_table(bits: int) -> npt.NDArray[np.generic]:
    return word_table(np.arange(1 << bits, dtype=np.uint8), bits)


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"codes of {bits} bits cannot be packed: {', '.join(map(str, WIDTHS))} can")
