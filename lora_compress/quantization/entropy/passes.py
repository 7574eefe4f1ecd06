"""The passes over a run of integers: whole symbols at a bit plane, then next bits, plane by plane.

A value v is written as the symbol 2 |v| - 1 if positive and 2 |v| if negative: 0, +1, -1, +2, -2 are 0, 1, 2, 3, 4. Above plane 0
it is written as the signed symbol 2 (|v| >> plane) + (v < 0): +0, -0, +1, -1 are 0, 1, 2, 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ...errors import FormatError
from .ans import AnsReader, AnsWriter
from .steps import Kind, Step, Table

__all__ = [
    "MAX_VALUE",
    "as_signed",
    "as_symbols",
    "as_values",
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


def as_signed(values: np.ndarray, plane: int) -> np.ndarray:
    """Signed symbols, int32, of integers."""
    return (np.abs(values) >> plane << 1) + (values < 0)


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
    for step in steps:
        plane, tables = step.plane, step.tables
        if step.kind == Kind.SYMBOLS:
            write_symbols(writer, as_symbols(run, plane), tables[0])
        elif step.kind == Kind.RAW:
            small, others = magnitudes >> step.above == 0, (1 << step.above) - 1
            writer.write(as_symbols(run[small]), *tables[0])
            writer.write(magnitudes[~small] & others, *tables[1])
        elif step.kind == Kind.SIGNED:
            write_symbols(writer, as_signed(run, plane), tables[0])
        else:
            before = as_signed(run, plane + 1)
            for table, chosen in _contexts(before, step):
                writer.write_grouped(magnitudes[chosen] >> plane & 1, *table)


def read_steps(reader: AnsReader, known: np.ndarray, steps: Iterable[Step]) -> None:
    """Fill in what steps tell of a run of integers (n,), in place: signed symbols at the last plane, at plane 0 symbols.

    Before the first step they may be anything.
    """
    for step in steps:
        plane, tables = step.plane, step.tables
        if step.kind in (Kind.SYMBOLS, Kind.SIGNED):
            known[:] = read_symbols(reader, len(known), tables[0], plane)
        elif step.kind == Kind.RAW:
            small = known == 0
            fresh = reader.read(int(np.count_nonzero(small)), *tables[0])
            positive = known & 1
            known[:] = (known + positive << step.above) - positive
            known[~small] += reader.read(len(known) - len(fresh), *tables[1]) << 1
            known[small] = fresh
        else:
            before = known.copy()
            known[:] = (before >> 1 << 2) + (before & 1)
            for table, chosen in _contexts(before, step):
                known[chosen] += reader.read_grouped(len(chosen), *table).astype(np.int32) << 1
            if not plane:
                known[before == 1] = 3
                np.maximum(known - 1, 0, out=known)


def _contexts(before: np.ndarray, step: Step) -> Iterator[tuple[Table, np.ndarray]]:
    """Tables of a BITS step and which values they are for, by their signed symbols one plane higher."""
    for table, (first, last) in zip(step.tables, step.contexts, strict=True):
        chosen = (before >= first) & (before <= last)
        if not step.plane:
            chosen &= before != 1
        yield table, chosen.nonzero()[0]
