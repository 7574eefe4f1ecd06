"""Refinement that costs the decoder nothing: each factor refitted to the other as coded."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...errors import SettingsError
from .integers import (
    QuantizedModule,
    as_array,
    quantize_module,
    quantize_rows,
    restore_module,
    restore_rows,
    row_units,
    with_models,
)

__all__ = ["refine_module", "rows_squared_error"]

_MOST_TURNS = 6
_TURNS = 400  # for each component beside a weight of both factors: a turn gains 4e-5 to 6e-5 bits per weight times that share
_SQUARABLE = 24  # octaves from 1 within which they do
_LEAST_BITS = 0.75  # per weight; below, what a refit finds is finer than the step size


def refine_module(down: Tensor, up: Tensor, step_size: float) -> QuantizedModule:
    """Quantize a module, then refit up to the coded down, down to the coded up, and so on, by least squares.

    A product of factors leaves r^2 numbers free, up' = A up and down' = A^-T down: the turns move towards integers that many
    such pairs lie close to. The result is kept if it lowers 1/2 log2 ||dW - dW'||_F^2 + bits per weight, along which a better
    quantizer lies: error alone could be bought with bits.
    """
    plain = quantize_module(down, up, step_size)
    weights = plain.rank * (down.shape[1] + up.shape[1])
    turns = min(plain.rank * plain.rank * _TURNS // max(weights, 1), _MOST_TURNS)
    if not turns or plain.payload_bits < _LEAST_BITS * weights:
        return plain
    factors = as_array(down), as_array(up)
    refined = _refit(plain, factors, step_size, turns)
    if refined is None:
        return plain
    return min(plain, refined, key=lambda module: _cost(module, factors, step_size, weights))


def _refit(module: QuantizedModule, factors: tuple[np.ndarray, np.ndarray], step_size: float, turns: int) -> QuantizedModule | None:
    """The integers after some turns, if there are any: coded rows may come so close to dependent that a fit explodes."""
    units = row_units(module.gains, step_size)
    values = list(module.values)
    for turn in range(turns):
        moving, fixed = 1 - turn % 2, turn % 2  # up first
        coded = restore_rows(values[fixed], module.scales[fixed], module.shapes[fixed], units)
        try:
            values[moving] = quantize_rows(_best_rows(coded, factors[fixed], factors[moving]), module.gains, step_size)
        except SettingsError:
            return None
    return with_models(module.gains, values[0], values[1], module.kept)


def _best_rows(coded: np.ndarray, exact: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rows (p, m) that, with coded rows F' (p, n), come closest to the product of F (k, n) and O (k, m): (F' F'^T)^-1 F' F^T O."""
    (exact, coded), _ = _squarable(exact, coded)
    gram = (coded @ coded.T).astype(np.float64)
    size = np.sqrt(np.diag(gram))
    size[size == 0] = 1  # of a row that has come to be zero: the best row beside it is zero too, and both are left out
    unit = gram / size / size[:, None] + np.eye(len(gram)) * 1e-9
    mixing = np.linalg.solve(unit, (coded @ exact.T).astype(np.float64) / size[:, None]) / size[:, None]
    return mixing.astype(np.float32) @ other


def rows_squared_error(down: np.ndarray, up: np.ndarray, coded_down: np.ndarray, coded_up: np.ndarray, kept: np.ndarray) -> float:
    """||up^T down - up'^T down'||_F^2, of rows down (k, n), up (k, m) and coded rows of the components kept (p,).

    From up^T down - up'^T down' = (up - up')^T down + up'^T (down - down'), so that small errors lose no digits.
    """
    (down, coded_down), scale_down = _squarable(down, coded_down)
    (up, coded_up), scale_up = _squarable(up, coded_up)
    lost_down, lost_up = _lost(down, coded_down, kept), _lost(up, coded_up, kept)
    error = _trace(_gram(lost_up), _gram(down)) + _trace(_gram(coded_up), _gram(lost_down[kept]))
    error += 2 * _trace(lost_up @ coded_up.T, down @ lost_down[kept].T)
    return max(error, 0.0) * scale_down**2 * scale_up**2


def _lost(rows: np.ndarray, coded: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Rows (k, n) less the coded rows (p, n) of the components kept (p,)."""
    if len(coded) == len(rows):
        return rows - coded
    lost = rows.copy()
    lost[kept] -= coded
    return lost


def _squarable(exact: np.ndarray, coded: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Rows divided by a power of two, and that power: their squares must fit into float32."""
    octaves = int(np.frexp(max(float(exact.max(initial=0)), -float(exact.min(initial=0))))[1])
    if abs(octaves) < _SQUARABLE:
        return (exact, coded), 1.0
    scale = np.float32(2.0**-octaves)
    return (exact * scale, coded * scale), 2.0**octaves


def _cost(module: QuantizedModule, factors: tuple[np.ndarray, np.ndarray], step_size: float, weights: int) -> float:
    error = rows_squared_error(*factors, *restore_module(module, step_size), module.kept)
    return 0.5 * float(np.log2(max(error, 1e-300))) + module.payload_bits / weights


def _gram(rows: np.ndarray) -> np.ndarray:
    return rows @ rows.T


def _trace(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.astype(np.float64) * b).sum())
