"""The passes over a run of integers: whole symbols at a bit plane, then plane by plane what is zero no more, and next bits.

A value v is written as the symbol 2 |v| - 1 if positive and 2 |v| if negative: 0, +1, -1, +2, -2 are 0, 1, 2, 3, 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..errors import FormatError
from .ans import AnsReader, AnsWriter
from .steps import Kind, Step, Table

__all__ = [
    "MAX_VALUE",
    "as_symbols",
    "as_values",
    "at_plane",
    "check_escaped",
    "read_steps",
    "read_symbols",
    "write_steps",
    "write_symbols",
]

MAX_VALUE = 2**28  # of a quantized magnitude; symbols are int32 and twice as large


def as_symbols(values: np.ndarray, plane: int = 0) -> np.ndarray:
    """Symbols, int32, of sign and magnitude >> plane of integers."""
    doubled = (np.abs(values) >> plane) << 1
    return np.maximum(doubled - (values > 0), 0, dtype=np.int32)


def as_values(symbols: np.ndarray) -> np.ndarray:
    """Undo `as_symbols`."""
    return np.where(symbols & 1, (symbols + 1) >> 1, -(symbols >> 1))


def write_symbols(writer: AnsWriter, symbols: np.ndarray, table: Table) -> None:
    """Code symbols (n,) by a table; those beyond it by its escape and, after the run, apart."""
    escape = _escape(table)
    if symbols.max(initial=0) >= escape:
        writer.write(np.minimum(symbols, escape), *table)
        writer.write_integers(symbols[symbols >= escape] - escape)
    else:
        writer.write(symbols, *table)


def read_symbols(reader: AnsReader, count: int, table: Table, plane: int = 0) -> np.ndarray:
    """Undo `write_symbols`: (count,), int32, of values at a plane.

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
    """Raises: FormatError: a value at a plane would be too large by what its escape stands for."""
    if extra > 2 * MAX_VALUE >> plane:
        raise FormatError("an entropy-coded payload holds a value that is too large: get the file again")


def _escape(table: Table) -> int:
    counts_of, *key = table
    return len(counts_of(*key)) - 1


def write_steps(writer: AnsWriter, run: np.ndarray, steps: Iterable[Step]) -> None:
    """Code what steps tell of integers (n,)."""
    magnitudes = np.abs(run)
    for kind, plane, above, tables in steps:
        if kind == Kind.SYMBOLS:
            write_symbols(writer, as_symbols(run, plane), tables[0])
        elif kind == Kind.RAW:
            small, others = magnitudes >> above == 0, (1 << above - plane) - 1
            writer.write(as_symbols(run[small], plane), *tables[0])
            writer.write(magnitudes[~small] >> plane & others, *tables[1])
        elif kind == Kind.SPLIT:
            writer.write_grouped(as_symbols(run[magnitudes >> above == 0], plane), *tables[0])
        else:
            pending = magnitudes[magnitudes >> above > 0] >> plane
            for table, chosen in _contexts(pending >> 1, tables):
                writer.write_grouped(pending[chosen] & 1, *table)


def read_steps(reader: AnsReader, known: np.ndarray, steps: Iterable[Step]) -> None:
    """Fill in what steps tell of a run of integers (n,), in place.

    They are symbols, int32, of the values with zeros in place of the bits that are not known. Before the first step they may be
    anything.
    """
    for kind, plane, above, tables in steps:
        if kind == Kind.SYMBOLS:
            known[:] = _placed(read_symbols(reader, len(known), tables[0], plane), plane)
        elif kind == Kind.RAW:
            small = known == 0
            fresh = reader.read(int(np.count_nonzero(small)), *tables[0])
            known[~small] += reader.read(len(known) - len(fresh), *tables[1]) << plane + 1
            known[small] = _placed(fresh, plane)
        elif kind == Kind.SPLIT:
            zeros = (known == 0).nonzero()[0]
            known[zeros] = _split_symbols(plane).take(reader.read_grouped(len(zeros), *tables[0]))
        else:
            large = (known > (2 << above) - 2).nonzero()[0]
            pending = known.take(large)
            bits = np.empty(len(pending), dtype=np.int32)
            for table, chosen in _contexts(pending + 1 >> above + 1, tables):
                bits[chosen] = reader.read_grouped(len(bits) if chosen is ... else len(chosen), *table)
            known[large] = pending + (bits << plane + 1)


def _contexts(higher: np.ndarray, tables: Sequence[Table]) -> Iterator[tuple[Table, Any]]:
    """Tables of next bits and which values they are for, by their magnitudes one plane higher."""
    last = len(tables)
    if last == 1:
        yield tables[0], ...
        return
    for context, table in enumerate(tables, start=1):
        yield table, (higher == context if context < last else higher >= last).nonzero()[0]


def _placed(symbols: np.ndarray, plane: int) -> np.ndarray:
    """Symbols of values whose symbols at a plane these are, with zeros below it."""
    if not plane:
        return symbols
    positive = symbols & 1
    return (symbols + positive << plane) - positive


def at_plane(symbols: np.ndarray, plane: int) -> np.ndarray:
    """Undo `_placed`."""
    if not plane:
        return symbols
    positive = symbols & 1
    return (symbols + positive >> plane) - positive


@cache
def _split_symbols(plane: int) -> np.ndarray:
    return _placed(np.arange(3, dtype=np.int32), plane)
