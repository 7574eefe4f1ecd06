"""The values of a run, coded bit plane by bit plane in the stages of a progressive payload.

Above plane 0 a value v is the signed symbol 2 (|v| >> plane) + (v < 0): +0, -0, +1, -1 are 0, 1, 2, 3. At plane 0 a negative zero
of the plane before can only be -1, so that no bit is coded for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .ans import AnsReader, AnsWriter
from .symbols import Table, read_symbols, write_symbols
from .tables import CONTEXTS, bit_contexts, bit_counts, signed_counts
from .values import Kind, Pass, lowest_symbol_plane, read_whole, whole_passes, write_whole

__all__ = ["PlaneRange", "plan_passes", "read_passes", "write_passes"]


class PlaneRange(NamedTuple):
    """A run with a model, on its way from one bit plane, or from nothing, down to another."""

    scale: int
    shape: int
    before: int | None
    after: int


@lru_cache(maxsize=4096)
def plan_passes(planes: PlaneRange) -> tuple[Pass, ...]:
    """Return the passes that lead a run from its plane before to the plane after."""
    scale, shape, before, after = planes
    passes: list[Pass] = []
    if before is None:
        if not after:
            return whole_passes(scale, shape)
        before = max(after, lowest_symbol_plane(scale))
        passes.append(Pass(Kind.SIGNED, before, ((signed_counts, scale - 8 * before, shape, before),)))
    for plane in reversed(range(after, before)):
        here = scale - 8 * plane
        contexts = bit_contexts(here, plane)
        passes.append(Pass(Kind.BITS, plane, tuple((bit_counts, here, shape, plane, context) for context in contexts)))
    return tuple(passes)


def write_passes(writer: AnsWriter, run: np.ndarray, passes: Iterable[Pass]) -> None:
    """Code of integers (n,) what the passes ask for."""
    for step in passes:
        if step.kind == Kind.SIGNED:
            write_symbols(writer, _as_signed(run, step.plane), step.tables[0])
        elif step.kind == Kind.BITS:
            magnitudes = np.abs(run)
            for table, chosen in _contexts(_as_signed(run, step.plane + 1), step):
                writer.write_grouped(magnitudes[chosen] >> step.plane & 1, *table)
        else:
            write_whole(writer, run, (step,))


def read_passes(reader: AnsReader, known: np.ndarray, passes: Iterable[Pass]) -> None:
    """Fill in a run (n,), in place: signed symbols at the last plane, symbols at plane 0.

    Before the first pass they may be anything.
    """
    for step in passes:
        if step.kind == Kind.SIGNED:
            known[:] = read_symbols(reader, len(known), step.tables[0], step.plane)
        elif step.kind == Kind.BITS:
            before = known.copy()
            known[:] = (before >> 1 << 2) + (before & 1)
            for table, chosen in _contexts(before, step):
                known[chosen] += reader.read_grouped(len(chosen), *table).astype(np.int32) << 1
            if not step.plane:
                known[before == 1] = 3
                np.maximum(known - 1, 0, out=known)
        else:
            read_whole(reader, known, (step,))


def _as_signed(values: np.ndarray, plane: int) -> np.ndarray:
    """Signed symbols, int32, of integers."""
    return (np.abs(values) >> plane << 1) + (values < 0)


def _contexts(before: np.ndarray, step: Pass) -> Iterator[tuple[Table, np.ndarray]]:
    """Tables of a BITS pass and which values they are for, by their signed symbols one plane higher."""
    for table, (first, last) in zip(step.tables, _context_ranges(len(step.tables)), strict=True):
        chosen = (before >= first) & (before <= last)
        if not step.plane:
            chosen &= before != 1
        yield table, chosen.nonzero()[0]


def _context_ranges(tables: int) -> tuple[tuple[int, int], ...]:
    """First and last signed symbol, before a BITS pass, of the values that each of its tables is for."""
    if tables == 1:
        return ((0, CONTEXTS[-1][1]),)
    return CONTEXTS if tables == len(CONTEXTS) else (CONTEXTS[0], *CONTEXTS[2:])
