"""The passes over one row of integers: whole symbols at a bit plane, then plane by plane what is zero no more, and next bits.

A value v is written as the symbol 2 |v| - 1 if positive and 2 |v| if negative: 0, +1, -1, +2, -2 are 0, 1, 2, 3, 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from ..errors import FormatError
from .ans import AnsReader, AnsWriter, uniform
from .schedule import Stage, lowest_symbol_plane, stage_at
from .tables import base_counts, bit_contexts, bit_counts, cell_centres, fine_planes, split_counts

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
    """Code symbols (n,) by the table of (scale, shape); those beyond it by the escape symbol and, after the row, apart."""
    key = (scale, shape, fine_planes(scale, plane))
    escape = len(base_counts(*key)) - 1
    beyond = symbols >= escape
    if beyond.any():
        writer.write(np.minimum(symbols, escape), base_counts, *key)
        writer.write_integers(symbols[beyond] - escape)
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
    escaped = (symbols == escape).nonzero()[0]
    if len(escaped):
        extra = reader.read_integers(len(escaped))
        if extra.max() > 2 * MAX_VALUE >> plane:
            raise FormatError("an entropy-coded payload holds a value that is too large: get the file again")
        symbols[escaped] += extra.astype(np.int32)
    return symbols


def write_passes(
    writer: AnsWriter, row: np.ndarray, known: np.ndarray, scale: int, shape: int, before: int, after: int
) -> np.ndarray:
    """Code what passes `before` + 1 to `after` tell of integers (n,); symbols known before and after them, (n,)."""
    for kind, plane, low in _plan(scale, before, after):
        exact = as_symbols(row, low)
        if kind == "symbols":
            known = exact
            write_symbols(writer, exact, scale - 8 * plane, shape, plane)
        elif kind == "raw":
            small, width = known == 0, plane - low
            writer.write(exact[small], uniform, (2 << width) - 1)
            writer.write((exact[~small] + 1 >> 1) & ((1 << width) - 1), uniform, 1 << width)
            known = exact
        elif kind == "split":
            zeros = (known == 0).nonzero()[0]
            known = _doubled(known)
            known[zeros] = exact[zeros]
            writer.write(exact[zeros], split_counts, scale - 8 * plane, shape, plane)
        else:
            for context, chosen in _by_parent(known, scale - 8 * plane):
                bits = (exact[chosen] - known[chosen]) >> 1
                writer.write(bits, bit_counts, scale - 8 * plane, shape, plane, context)
            known = exact
    return known


def read_passes(reader: AnsReader, known: np.ndarray, scale: int, shape: int, before: int, after: int) -> np.ndarray:
    """Symbols known of a row (n,), int32, after pass `after`, given those known after pass `before`."""
    for kind, plane, low in _plan(scale, before, after):
        if kind == "symbols":
            known = read_symbols(reader, len(known), scale - 8 * plane, shape, plane)
        elif kind == "raw":
            small, width = known == 0, plane - low
            for _ in range(width):
                known = _doubled(known)
            known[small] = reader.read(int(small.sum()), uniform, (2 << width) - 1)
            known[~small] += reader.read(int((~small).sum()), uniform, 1 << width) << 1
        elif kind == "split":
            zeros = (known == 0).nonzero()[0]
            known = _doubled(known)
            known[zeros] = reader.read(len(zeros), split_counts, scale - 8 * plane, shape, plane)
        else:
            for context, chosen in _by_parent(known, scale - 8 * plane):
                known[chosen] += reader.read(len(chosen), bit_counts, scale - 8 * plane, shape, plane, context) << 1
    return known


def reconstruct(symbols: np.ndarray, scale: int, shape: int, stage: Stage, unit: float) -> np.ndarray:
    """Expected weights (n,), float32: `unit` times the centre of mass of the cell that each symbol stands for."""
    largest = int(symbols.max(initial=0))
    table = (_tabled(scale, shape, stage)[: largest + 1] * unit).astype(np.float32)
    if largest < _TABLED:
        return table[symbols]
    weights = table[np.minimum(symbols, _TABLED - 1)]
    beyond = symbols >= _TABLED
    weights[beyond] = _expected(symbols[beyond], scale, shape, stage) * unit
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


def _by_parent(known: np.ndarray, scale: int) -> Iterator[tuple[int, np.ndarray]]:
    """Places (m,) whose magnitude lacks its last bit, by the magnitude one plane higher: 1, 2, ... and the last for all above."""
    last = bit_contexts(scale)
    least = 4 * last - 1  # the symbol of 2 * last
    groups = [((known >= 4 * context - 1) & (known <= 4 * context)).nonzero()[0] for context in range(1, last)]
    yield from enumerate([*groups, (known >= least).nonzero()[0]], start=1)


def _doubled(symbols: np.ndarray) -> np.ndarray:
    """Symbols of twice the values."""
    return (symbols << 1) + (symbols & 1)
