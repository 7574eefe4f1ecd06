"""The passes over a run of integers: whole symbols at a bit plane, then plane by plane what is zero no more, and next bits.

A value v is written as the symbol 2 |v| - 1 if positive and 2 |v| if negative: 0, +1, -1, +2, -2 are 0, 1, 2, 3, 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import FormatError
from .ans import AnsReader, AnsWriter, uniform
from .schedule import Stage, lowest_symbol_plane, stage_at
from .tables import MAX_SCALE, base_counts, bit_contexts, bit_counts, cell_centres, fine_planes, split_counts

__all__ = ["MAX_VALUE", "as_symbols", "as_values", "read_passes", "read_symbols", "reconstruct", "write_passes", "write_symbols"]

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


def write_passes(
    writer: AnsWriter, run: np.ndarray, known: np.ndarray, scale: int, shape: int, before: int, after: int
) -> np.ndarray:
    """Code what passes `before` + 1 to `after` tell of integers (n,); symbols known before and after them, (n,)."""
    for kind, plane, low in _plan(scale, before, after):
        exact = as_symbols(run, low)
        if kind == "symbols":
            write_symbols(writer, exact, scale - 8 * plane, shape, plane)
        elif kind == "raw":
            small, width = known == 0, plane - low
            writer.write(exact[small], uniform, (2 << width) - 1)
            writer.write((exact[~small] + 1 >> 1) & ((1 << width) - 1), uniform, 1 << width)
        elif kind == "split":
            zeros = (known == 0).nonzero()[0]
            fresh = exact[zeros]
            known = _doubled(known)
            known[zeros] = fresh
            writer.write_grouped(fresh, split_counts, scale - 8 * plane, shape, plane)
            continue  # of the other values the last bit is not yet known
        else:
            for table, chosen in _pending(known, scale - 8 * plane, shape, plane):
                writer.write_grouped((exact[chosen] - known[chosen]) >> 1, *table)
        known = exact
    return known


def read_passes(reader: AnsReader, known: np.ndarray, scale: int, shape: int, before: int, after: int) -> np.ndarray:
    """Symbols known of a run (n,), int32, after pass `after`, given those known after pass `before`, which are lost."""
    for kind, plane, low in _plan(scale, before, after):
        if kind == "symbols":
            known = read_symbols(reader, len(known), scale - 8 * plane, shape, plane)
        elif kind == "raw":
            zeros, others, width = (known == 0).nonzero()[0], known.nonzero()[0], plane - low
            known = ((known + 1 >> 1) << (width + 1)) - (known & 1)
            known[zeros] = reader.read(len(zeros), uniform, (2 << width) - 1)
            known[others] += reader.read(len(others), uniform, 1 << width) << 1
        elif kind == "split":
            zeros = (known == 0).nonzero()[0]
            known = _doubled(known)
            known[zeros] = reader.read_grouped(len(zeros), split_counts, scale - 8 * plane, shape, plane)
        else:
            for table, chosen in _pending(known, scale - 8 * plane, shape, plane):
                known[chosen] += reader.read_grouped(len(chosen), *table) << 1
    return known


def reconstruct(
    symbols: np.ndarray, scales: Sequence[int], shapes: Sequence[int], stages: Sequence[Stage], units: np.ndarray
) -> np.ndarray:
    """Expected weights (r, n), float32: the unit of each row times the centre of mass of the cell that each symbol stands for.

    Args:
        symbols: (r, n), not negative.
        scales, shapes, stages: of the rows.
        units: (r,), float64.
    """
    largest = symbols.max(axis=1, initial=0)
    sizes = np.minimum(largest, _TABLED - 1) + 1
    described = list(zip(scales, shapes, stages, strict=True))
    tables = [_tabled(*row)[:size] * unit for row, size, unit in zip(described, sizes.tolist(), units.tolist(), strict=True)]
    table = np.concatenate([np.empty(0), *tables]).astype(np.float32)
    starts = (np.cumsum(sizes) - sizes)[:, None]
    tall = largest >= _TABLED
    weights = table.take(np.minimum(symbols, _TABLED - 1) + starts if tall.any() else symbols + starts)
    for row in tall.nonzero()[0].tolist():
        beyond = symbols[row] >= _TABLED
        weights[row, beyond] = _expected(symbols[row, beyond], *described[row]) * units[row]
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


def _pending(known: np.ndarray, scale: int, shape: int, plane: int) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    """Tables of next bits, and the places (m,) of the symbols they are for: those whose magnitude is above 1.

    By the magnitude one plane higher, 1, 2 or more, where that matters.
    """
    wide = (known > 2).nonzero()[0]
    if scale > MAX_SCALE:
        yield (uniform, 2), wide
        return
    last = bit_contexts(scale)
    for context in range(1, last):
        near = known[wide] <= 4 * context
        yield (bit_counts, scale, shape, plane, context), wide[near]
        wide = wide[~near]
    yield (bit_counts, scale, shape, plane, last), wide


def _doubled(symbols: np.ndarray) -> np.ndarray:
    """Symbols of twice the values."""
    return (symbols << 1) + (symbols & 1)
