"""The values of a module's rows, coded whole: symbols of a table, and below them bits that are as good as uniform.

Rows that share a table are coded as one long run. `planes` codes the same values plane by plane, for progressive payloads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .ans import AnsReader, AnsWriter, uniform
from .symbols import Table, as_symbols, read_symbols, symbol_table, write_symbols
from .tables import MAX_SCALE

__all__ = ["Kind", "Pass", "Run", "lowest_symbol_plane", "read_whole", "row_runs", "run_places", "whole_passes", "write_whole"]


class Kind(IntEnum):
    """What a pass over a run codes.

    Args:
        SYMBOLS: all values at a plane, zero without a sign.
        RAW: the bits of all values from a plane down to 0, by one table if they are zero there, by another if not.
        SIGNED: all values at a plane, zero with a sign; see `planes`.
        BITS: the next bit of all values that are known with the sign of zero; see `planes`.
    """

    SYMBOLS = 0
    RAW = 1
    SIGNED = 2
    BITS = 3


class Pass(NamedTuple):
    """A pass over a run.

    Args:
        kind: what it codes.
        plane: down to which values are known after it.
        tables: by which it codes.
        above: the plane before a RAW pass.
    """

    kind: Kind
    plane: int
    tables: tuple[Table, ...]
    above: int = 0


class Run(NamedTuple):
    """Rows that share tables and passes.

    Args:
        scale: of the rows.
        shape: of the rows.
        start: stage of a progressive payload in which they start, 0 in others.
        rows: (q,), their numbers, rising; those of up follow those of down.
    """

    scale: int
    shape: int
    start: int
    rows: np.ndarray


def row_runs(scales: np.ndarray, shapes: np.ndarray, starts: np.ndarray | int = 0) -> list[Run]:
    """Return the runs of a module: by scale, then by shape, then by the stage in which they start.

    Args:
        scales: (2, r), of the rows of down and of up.
        shapes: (2, r), likewise.
        starts: (r,), of the components of a progressive payload.
    """
    models = np.stack([scales, shapes, np.broadcast_to(starts, scales.shape)]).reshape(3, -1)
    order = np.lexsort(models[::-1])
    models = models[:, order]
    changes = [0, *((models[:, 1:] != models[:, :-1]).any(axis=0).nonzero()[0] + 1).tolist(), len(order)]
    runs = []
    for begin, end in pairwise(changes):
        scale, shape, start = models[:, begin].tolist()
        runs.append(Run(scale, shape, start, order[begin:end]))
    return runs


def run_places(runs: Sequence[Run], widths: np.ndarray) -> tuple[list[slice], np.ndarray]:
    """Return where each run is in the symbols of a module, one run after the other, and where each row, (2 r,), begins there."""
    order = np.concatenate([run.rows for run in runs])
    edges = np.concatenate([[0], np.cumsum(widths[order])])
    begins = np.empty(len(order), dtype=np.int64)
    begins[order] = edges[:-1]
    ends = edges[np.cumsum([0, *(len(run.rows) for run in runs)])].tolist()
    return [slice(*pair) for pair in pairwise(ends)], begins


def lowest_symbol_plane(scale: int) -> int:
    """Return the lowest plane at which a row's values are coded as symbols."""
    return max(0, -((MAX_SCALE - scale) // 8))


@lru_cache(maxsize=4096)
def whole_passes(scale: int, shape: int) -> tuple[Pass, ...]:
    """Return the passes that code all values of a run from nothing."""
    plane = lowest_symbol_plane(scale)
    symbols = Pass(Kind.SYMBOLS, plane, (symbol_table(scale - 8 * plane, shape, plane),))
    return (symbols, Pass(Kind.RAW, 0, ((uniform, (2 << plane) - 1), (uniform, 1 << plane)), plane)) if plane else (symbols,)


def write_whole(writer: AnsWriter, run: np.ndarray, passes: Iterable[Pass]) -> None:
    """Code integers (n,) by `whole_passes`."""
    for kind, plane, tables, above in passes:
        if kind == Kind.SYMBOLS:
            write_symbols(writer, as_symbols(run, plane), tables[0])
        else:
            magnitudes = np.abs(run)
            small, others = magnitudes >> above == 0, (1 << above) - 1
            writer.write(as_symbols(run[small]), *tables[0])
            writer.write(magnitudes[~small] & others, *tables[1])


def read_whole(reader: AnsReader, known: np.ndarray, passes: Iterable[Pass]) -> None:
    """Fill in the symbols (n,) of a run, in place, by `whole_passes`."""
    for kind, plane, tables, above in passes:
        if kind == Kind.SYMBOLS:
            known[:] = read_symbols(reader, len(known), tables[0], plane)
        else:
            small = known == 0
            fresh = reader.read(int(np.count_nonzero(small)), *tables[0])
            positive = known & 1
            known[:] = (known + positive << above) - positive
            known[~small] += reader.read(len(known) - len(fresh), *tables[1]) << 1
            known[small] = fresh
