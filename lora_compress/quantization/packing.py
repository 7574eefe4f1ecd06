"""Codes of a few bits, packed into bytes row by row and back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_bits", "packed_width", "unpack_bits"]


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (r, n), uint8 below 2^bits, into (r, packed_width(n)) bytes, the first code in the high bits.

    Two 4-bit codes share a byte in the order that bitsandbytes uses; the last byte of a row is filled with zero bits.
    """
    if bits == 8:
        return codes
    if bits != 4:
        raise ValueError(f"codes of {bits} bits cannot be packed: 4 and 8 can")
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`: bytes (r, packed_width(count)) to codes (r, count), uint8."""
    if bits == 8:
        return packed
    if bits != 4:
        raise ValueError(f"codes of {bits} bits cannot be unpacked: 4 and 8 can")
    return torch.stack([packed >> 4, packed & 15], dim=2).reshape(packed.shape[0], -1)[:, :count]
