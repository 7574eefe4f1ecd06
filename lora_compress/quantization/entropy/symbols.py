"""Integers as symbols of a table, with an escape for those that are too large for it.

A value v is the symbol 2 |v| - 1 if it is positive and 2 |v| if it is negative: 0, +1, -1, +2, -2 are 0, 1, 2, 3, 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import FormatError
from .ans import AnsReader, AnsWriter
from .tables import base_counts, fine_planes

__all__ = ["MAX_VALUE", "Table", "as_symbols", "as_values", "check_escaped", "read_symbols", "symbol_table", "write_symbols"]

Table = tuple[Any, ...]  # a function that makes counts, and the arguments to call it with
MAX_VALUE = 2**28  # of a quantized magnitude; symbols are int32 and twice as large


def symbol_table(scale: int, shape: int, plane: int = 0) -> Table:
    """Return the table of values at a bit plane whose distribution has this scale there; its last symbol is the escape."""
    return base_counts, scale, shape, fine_planes(scale, plane)


def as_symbols(values: np.ndarray, plane: int = 0) -> np.ndarray:
    """Return symbols, int32, of the sign and magnitude >> plane of integers."""
    doubled = (np.abs(values) >> plane) << 1
    return np.maximum(doubled - (values > 0), 0, dtype=np.int32)


def as_values(symbols: np.ndarray) -> np.ndarray:
    """Undo `as_symbols` at plane 0."""
    return np.where(symbols & 1, (symbols + 1) >> 1, -(symbols >> 1))


def write_symbols(writer: AnsWriter, symbols: np.ndarray, table: Table) -> None:
    """Code symbols (n,) by a table; those beyond it by its escape and, after all of them, by what they exceed it by."""
    escape = _escape(table)
    if symbols.max(initial=0) >= escape:
        writer.write(np.minimum(symbols, escape), *table)
        writer.write_integers(symbols[symbols >= escape] - escape)
    else:
        writer.write(symbols, *table)


def read_symbols(reader: AnsReader, count: int, table: Table, plane: int = 0) -> np.ndarray:
    """Undo `write_symbols`: (count,), int32, of values at a bit plane.

    Raises:
        FormatError: a value that is too large.
    """
    escape = _escape(table)
    symbols = reader.read(count, *table)
    if symbols.max(initial=0) == escape:
        escaped = np.flatnonzero(symbols == escape)
        extra = reader.read_integers(len(escaped))
        check_escaped(int(extra.max()), plane)
        symbols[escaped] += extra.astype(np.int32)
    return symbols


def check_escaped(extra: int, plane: int = 0) -> None:
    """Raise FormatError if a value at a plane would be too large by what its escape stands for."""
    if extra > 2 * MAX_VALUE >> plane:
        raise FormatError("an entropy-coded payload holds a value that is too large: get the file again")


def _escape(table: Table) -> int:
    counts_of, *key = table
    return len(counts_of(*key)) - 1
