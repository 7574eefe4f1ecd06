"""What the symbols of a module's rows stand for: its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .passes import at_plane
from .schedule import Stage
from .tables import cell_centres

__all__ = ["Model", "expected_values", "row_weights"]

_CENTRE = 2.0**-12
_TABLED = 2048  # symbols whose weight is looked up
_BITS = {np.float16: np.uint16, np.float32: np.uint32}


class Model(NamedTuple):
    """The distribution of a row's values, and what is known of them."""

    scale: int
    shape: int
    stage: Stage


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
        symbols: (n,), int32, as `passes.read_steps` leaves them.
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
    planes = np.array([model.stage.plane for model in models])
    centres = np.array([_tabled(*model)[:size] for model in models]).reshape(-1, size)
    tables = (centres * units[:, None]).astype(np.float32).astype(dtype, copy=False)
    rows = np.stack([begins, targets, widths, planes], axis=1)
    (look_up or _look_up)(symbols, rows, tables.view(_BITS[dtype]), weights.view(_BITS[dtype]))
    if largest >= _TABLED:
        for (begin, target, width, plane), model, unit in zip(rows.tolist(), models, units.tolist(), strict=True):
            row = at_plane(symbols[begin : begin + width], plane)
            if (beyond := (row >= _TABLED).nonzero()[0]).size:
                weights[target + beyond] = (expected_values(row[beyond], *model) * unit).astype(np.float32)
    return weights


def _look_up(symbols: np.ndarray, rows: np.ndarray, tables: np.ndarray, weights: np.ndarray) -> None:
    """As `kernels.look_up`."""
    for (begin, target, width, plane), table in zip(rows.tolist(), tables, strict=True):
        table.take(at_plane(symbols[begin : begin + width], plane), mode="clip", out=weights[target : target + width])


@lru_cache(maxsize=1024)
def _tabled(scale: int, shape: int, stage: Stage) -> np.ndarray:
    return expected_values(np.arange(_TABLED), scale, shape, stage)


def expected_values(symbols: np.ndarray, scale: int, shape: int, stage: Stage) -> np.ndarray:
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
