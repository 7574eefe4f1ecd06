"""The passes over a run of integers: whole symbols at a bit plane, then plane by plane what is zero no more, and next bits.

A value v is written as the symbol 2 |v| - 1 if positive and 2 |v| if negative: 0, +1, -1, +2, -2 are 0, 1, 2, 3, 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ..errors import FormatError
from .ans import AnsReader, AnsWriter, uniform
from .schedule import Stage, lowest_symbol_plane, stage_at
from .tables import MAX_SCALE, base_counts, bit_contexts, bit_counts, cell_centres, fine_planes, split_counts

__all__ = [
    "MAX_VALUE",
    "as_symbols",
    "as_values",
    "at_plane",
    "read_passes",
    "read_symbols",
    "reconstruct",
    "write_passes",
    "write_symbols",
]

MAX_VALUE = 2**28  # of a quantized magnitude; symbols are int32 and twice as large
_CENTRE = 2.0**-12
_TABLED = 2048  # symbols whose weight is looked up


def as_symbols(values: np.ndarray, plane: int = 0) -> np.ndarray:
    """Symbols, int32, of sign and magnitude >> plane of integers."""
    doubled = (np.abs(values) >> plane) << 1
    return np.maximum(doubled - (values > 0), 0, dtype=np.int32)


def as_values(symbols: np.ndarray) -> np.ndarray:
    """Undo `as_symbols`."""
    return np.where(symbols & 1, (symbols + 1) >> 1, -(symbols >> 1))


def write_symbols(writer: AnsWriter, symbols: np.ndarray, scale: int, shape: int, plane: int = 0) -> None:
    """Code symbols (n,) by the table of (scale, shape); those beyond it by the escape symbol and, after the run, apart."""
    key = (scale, shape, fine_planes(scale, plane))
    escape = len(base_counts(*key)) - 1
    if symbols.max(initial=0) >= escape:
        writer.write(np.minimum(symbols, escape), base_counts, *key)
        writer.write_integers(symbols[symbols >= escape] - escape)
    else:
        writer.write(symbols, base_counts, *key)


def read_symbols(reader: AnsReader, count: int, scale: int, shape: int, plane: int = 0) -> np.ndarray:
    """Undo `write_symbols`: (count,), int32.

    Raises:
        FormatError: a value that is too large.
    """
    key = (scale, shape, fine_planes(scale, plane))
    escape = len(base_counts(*key)) - 1
    symbols = reader.read(count, base_counts, *key)
    if symbols.max(initial=0) == escape:
        escaped = np.flatnonzero(symbols == escape)
        extra = reader.read_integers(len(escaped))
        if extra.max() > 2 * MAX_VALUE >> plane:
            raise FormatError("an entropy-coded payload holds a value that is too large: get the file again")
        symbols[escaped] += extra.astype(np.int32)
    return symbols


def write_passes(writer: AnsWriter, run: np.ndarray, scale: int, shape: int, before: int, after: int) -> None:
    """Code what passes `before` + 1 to `after` tell of integers (n,)."""
    magnitudes = np.abs(run)
    for kind, plane, low in _plan(scale, before, after):
        if kind == "symbols":
            write_symbols(writer, as_symbols(run, plane), scale - 8 * plane, shape, plane)
        elif kind == "raw":
            small, width = magnitudes >> plane == 0, plane - low
            writer.write(as_symbols(run[small], low), uniform, (2 << width) - 1)
            writer.write(magnitudes[~small] >> low & ((1 << width) - 1), uniform, 1 << width)
        elif kind == "split":
            fresh = as_symbols(run[magnitudes >> plane + 1 == 0], plane)
            writer.write_grouped(fresh, split_counts, scale - 8 * plane, shape, plane)
        else:
            pending = magnitudes[magnitudes >> plane + 1 > 0] >> plane
            for table, chosen in _contexts(pending >> 1, scale - 8 * plane, shape, plane):
                writer.write_grouped(pending[chosen] & 1, *table)


def read_passes(reader: AnsReader, known: np.ndarray, scale: int, shape: int, before: int, after: int) -> np.ndarray:
    """What is known of a run of integers (n,) after pass `after`, as symbols, given those of pass `before`, which are lost.

    They are symbols, int32, of the values with zeros in place of the bits that are not known: passes fill them in. Before the first
    pass `known` is of that size and may hold anything.
    """
    for kind, plane, low in _plan(scale, before, after):
        if kind == "symbols":
            known = _placed(read_symbols(reader, len(known), scale - 8 * plane, shape, plane), plane)
        elif kind == "raw":
            small, width = known == 0, plane - low
            fresh = reader.read(int(np.count_nonzero(small)), uniform, (2 << width) - 1)
            known[~small] += reader.read(len(known) - len(fresh), uniform, 1 << width) << low + 1
            known[small] = _placed(fresh, low)
        elif kind == "split":
            zeros = (known == 0).nonzero()[0]
            fresh = reader.read_grouped(len(zeros), split_counts, scale - 8 * plane, shape, plane)
            known[zeros] = _split_symbols(plane).take(fresh)
        else:
            large = (known > (4 << plane) - 2).nonzero()[0]
            pending = known.take(large)
            bits = np.empty(len(pending), dtype=np.int32)
            for table, chosen in _contexts((pending + 1) >> plane + 2, scale - 8 * plane, shape, plane):
                bits[chosen] = reader.read_grouped(len(bits) if chosen is ... else len(chosen), *table)
            known[large] = pending + (bits << plane + 1)
    return known


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


def reconstruct(
    symbols: np.ndarray,
    scales: Sequence[int],
    shapes: Sequence[int],
    stages: Sequence[Stage],
    units: np.ndarray,
    dtype: type[np.floating] = np.float32,
) -> np.ndarray:
    """Expected weights (r, n), float32 rounded to `dtype`: unit times the centre of mass of the cell that the value lies in.

    Args:
        symbols: (r, n), of values in units of the planes of their rows.
        scales, shapes, stages: of the rows.
        units: (r,), float64.
    """
    largest = symbols.max(axis=1, initial=0)
    sizes = np.minimum(largest, _TABLED - 1) + 1
    described = list(zip(scales, shapes, stages, strict=True))
    tables = [_tabled(*row)[:size] for row, size in zip(described, sizes.tolist(), strict=True)]
    table = (np.concatenate([np.empty(0), *tables]) * units.repeat(sizes)).astype(np.float32).astype(dtype, copy=False)
    starts = (np.cumsum(sizes) - sizes).astype(np.int32)[:, None]
    tall = largest >= _TABLED
    weights = table.take(np.minimum(symbols, _TABLED - 1) + starts if tall.any() else symbols + starts, mode="clip")  # the fastest
    for row in tall.nonzero()[0].tolist():
        beyond = symbols[row] >= _TABLED
        weights[row, beyond] = (_expected(symbols[row, beyond], *described[row]) * units[row]).astype(np.float32)
    return weights


@lru_cache(maxsize=1024)
def _tabled(scale: int, shape: int, stage: Stage) -> np.ndarray:
    return _expected(np.arange(_TABLED), scale, shape, stage)


def _expected(symbols: np.ndarray, scale: int, shape: int, stage: Stage) -> np.ndarray:
    """Centres in steps, float64, of symbols (n,) at a stage."""
    magnitudes = symbols + 1 >> 1
    here = scale - 8 * stage.plane
    centres = _centres(magnitudes, here, shape, stage.plane, 0)
    if stage.halved:
        centres = np.where(magnitudes > 1, _centres(magnitudes >> 1, here, shape, stage.plane, 1), centres)
    return np.where(symbols & 1, centres, -centres) * float(1 << stage.plane)


def _centres(cells: np.ndarray, scale: int, shape: int, plane: int, width: int) -> np.ndarray:
    """Centres of cells (n,) that are 2^width steps of `plane` wide, in these steps: tabled, or the middle of the integers."""
    table = cell_centres(scale, shape, plane, width)
    middle = (cells + 0.5) * (1 << width) - 0.5 / (1 << plane)
    return np.where(cells < len(table), table[np.minimum(cells, len(table) - 1)] * _CENTRE, middle)


@lru_cache(maxsize=4096)
def _plan(scale: int, before: int, after: int) -> tuple[tuple[str, int, int], ...]:
    """Passes to make: kind, plane before and plane after; of kinds symbols, raw, split, bits."""
    steps = []
    position = before
    if not position and after:
        position = after if after % 2 else after - 1
        target = stage_at(scale, position).plane
        plane = max(target, lowest_symbol_plane(scale))
        steps.append(("symbols", plane, plane))
        if plane > target:
            steps.append(("raw", plane, target))
    while position < after:
        position += 1
        stage = stage_at(scale, position)
        steps.append(("split" if stage.halved else "bits", stage.plane, stage.plane))
    return tuple(steps)


def _contexts(higher: np.ndarray, scale: int, shape: int, plane: int) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Tables of next bits and which values they are for, by their magnitudes one plane higher: 1, 2 or more where that matters."""
    last = bit_contexts(scale)
    if scale > MAX_SCALE:
        yield (uniform, 2), ...
    elif last == 1:
        yield (bit_counts, scale, shape, plane, 1), ...
    else:
        for context in range(1, last + 1):
            yield (bit_counts, scale, shape, plane, context), (higher == context if context < last else higher >= last).nonzero()[0]
