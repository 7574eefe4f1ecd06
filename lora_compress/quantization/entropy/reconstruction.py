"""What the symbols of a module's rows stand for: its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .tables import cell_centres

__all__ = ["Model", "expected_values", "row_weights"]

_CENTRE = 2.0**-12
_TABLED = 2048  # symbols whose weight is looked up
_BITS = {np.float16: np.uint16, np.float32: np.uint32}


class Model(NamedTuple):
    """The distribution of a row's values, and the plane down to which they are known."""

    scale: int
    shape: int
    plane: int


def row_weights(
    symbols: np.ndarray,
    begins: np.ndarray,
    widths: np.ndarray,
    models: Sequence[Model],
    units: np.ndarray,
    dtype: type[np.floating] = np.float32,
    look_up: Callable[..., None] | None = None,
) -> np.ndarray:
    """Expected weights, (sum of widths,), of rows one after the other: unit times the centre of the cell that a value lies in.

    Args:
        symbols: (n,), int32, as `planes.read_passes` leaves them.
        begins: (r,), where each row begins there.
        widths: (r,), of the rows.
        models: of the rows.
        units: (r,), float64.
        dtype: of the weights, which are rounded to float32 before.
        look_up: `kernels.look_up`, if there.
    """
    weights = np.empty(int(widths.sum()), dtype=dtype)
    targets = np.cumsum(widths) - widths
    largest = int(symbols.max(initial=0))
    size = min(largest, _TABLED - 1) + 1
    centres = np.array([_tabled(*model)[:size] for model in models]).reshape(-1, size)
    tables = (centres * units[:, None]).astype(np.float32).astype(dtype, copy=False)
    rows = np.stack([begins, targets, widths], axis=1)
    (look_up or _look_up)(symbols, rows, tables.view(_BITS[dtype]), weights.view(_BITS[dtype]))
    if largest >= _TABLED:
        for (begin, target, width), model, unit in zip(rows.tolist(), models, units.tolist(), strict=True):
            row = symbols[begin : begin + width]
            if (beyond := (row >= _TABLED).nonzero()[0]).size:
                weights[target + beyond] = (expected_values(row[beyond], *model) * unit).astype(np.float32)
    return weights


def _look_up(symbols: np.ndarray, rows: np.ndarray, tables: np.ndarray, weights: np.ndarray) -> None:
    """As `kernels.look_up`."""
    for (begin, target, width), table in zip(rows.tolist(), tables, strict=True):
        table.take(symbols[begin : begin + width], mode="clip", out=weights[target : target + width])


@lru_cache(maxsize=1024)
def _tabled(scale: int, shape: int, plane: int) -> np.ndarray:
    return expected_values(np.arange(_TABLED), scale, shape, plane)


def expected_values(symbols: np.ndarray, scale: int, shape: int, plane: int) -> np.ndarray:
    """Centres in steps, float64, of symbols (n,) at a plane; above plane 0, zero has a sign."""
    signed = symbols if plane else symbols + (symbols > 0)
    magnitudes, negative = signed >> 1, signed & 1
    table, below = cell_centres(scale - 8 * plane, shape, plane)
    if len(table):
        known = table.take(np.minimum(magnitudes, len(table) - 1))
        known = np.where(signed == 1, below, known) * _CENTRE
    else:
        known = np.zeros(len(symbols))
    middle = magnitudes + 0.5 * (1 - 0.5**plane) + np.where(signed == 1, 0.5 ** (plane + 1), 0.0)
    centres = np.where(magnitudes < len(table), known, middle)
    return np.where(negative, -centres, centres) * float(1 << plane)
