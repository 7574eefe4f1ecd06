"""Where the tensors of a safetensors file lie: one after the other, without overlaps or holes, as the format demands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FormatError
from .dtypes import DTYPES, TensorSpec

__all__ = ["StoredTensor", "stored_tensors"]

_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "C64": 64}  # of a number, where the name does not end with them
_LARGEST = 1 << 48  # of a size or an offset


class StoredTensor(NamedTuple):
    """What the header of a file says of one tensor.

    Args:
        dtype: name of its type in the format, which may be one that this program does not know.
        shape: of the tensor.
        begin: its first byte, counted from where the data begin.
        end: the byte after its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def spec(self, path: Path, key: str) -> TensorSpec:
        """Return its type and shape.

        Raises:
            FormatError: the type is not read here.
        """
        if self.dtype not in DTYPES:
            raise FormatError(f"{path}: {key}: is {self.dtype!r}, a type that is not read here, allowed: {', '.join(DTYPES)}")
        return TensorSpec(DTYPES[self.dtype], self.shape)


def stored_tensors(path: Path, entries: Mapping[str, Any], available: int) -> dict[str, StoredTensor]:
    """Check what the header of a safetensors file says of its tensors, against itself and against the size of the file.

    Each tensor must begin where the one before it ends, the first at 0, and have as many bytes as its shape and type take:
    tensors that overlap would let a small file stand for any amount of memory. A file that ends early is not refused here,
    since the beginning of a packed file is a file.

    Args:
        path: of the file, for messages.
        entries: the header's JSON object without the metadata: dtype, shape and data_offsets by key.
        available: bytes of data that the file has.

    Returns:
        The tensors by key, in the order of the header.

    Raises:
        FormatError: names the tensor that is wrong, or the bytes that belong to none.
    """
    found = {key: _stored(path, key, entry) for key, entry in entries.items()}
    expected = 0
    for begin, end, key in sorted((tensor.begin, tensor.end, key) for key, tensor in found.items()):
        if begin != expected:
            what = "overlaps the one before it" if begin < expected else "leaves a hole before it"
            raise FormatError(
                f"{path}: {key}: begins at byte {begin} of the data, allowed: {expected}: it {what}: the file is damaged"
            )
        expected = end
    if available > expected:
        raise FormatError(
            f"{path}: {available - expected} bytes behind its last tensor belong to none, allowed: 0: "
            "the file is damaged, get it again"
        )
    return found


def _stored(path: Path, key: str, entry: Any) -> StoredTensor:
    """Read one entry of the header."""
    try:
        name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = isinstance(name, str) and isinstance(shape, list) and len(shape) <= 64
        if not sound or not all(type(number) is int and 0 <= number < _LARGEST for number in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{path}: {key}: its entry in the header is damaged: get the file again") from None
    bits = _bits(name)
    if end < begin or (bits is not None and (end - begin) * 8 != math.prod(shape) * bits):
        raise FormatError(
            f"{path}: {key}: has {end - begin} bytes, {name} {tuple(shape)} takes others: the file is damaged, get it again"
        )
    return StoredTensor(name, tuple(shape), begin, end)


def _bits(name: str) -> int | None:
    """Return the bits of a number of a type such as BF16 or F8_E4M3; None for a type that is unknown here."""
    if name in _BITS:
        return _BITS[name]
    digits = name.partition("_")[0].lstrip("BFIU")
    return int(digits) if digits in ("8", "16", "32", "64") else None
