"""Refinement that costs the decoder nothing: each factor refitted to the other as coded."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..errors import SettingsError
from .integers import QuantizedModule, as_array, quantize_module, quantize_rows, restore_module, with_models

__all__ = ["refine_module", "rows_squared_error"]

_ROUNDS = 2


def refine_module(down: Tensor, up: Tensor, step: float) -> QuantizedModule:
    """Quantize a module, then alternately refit up to the coded down and down to the coded up by least squares.

    With coded rows D', the best up is (D' D'^T)^-1 D' D^T U. What is kept minimises 1/2 log2 ||dW - dW'||_F^2 + bits per weight,
    along which a better quantizer lies: error alone could be bought with bits.
    """
    factors = as_array(down), as_array(up)
    module = best = quantize_module(down, up, step)
    if not module.rank:
        return module
    weights = module.rank * (down.shape[1] + up.shape[1])
    restored = restore_module(module, step)
    least = _cost(module, factors, restored, weights)
    for turn in range(2 * _ROUNDS):
        side = 1 - turn % 2  # up first
        fixed = restored[1 - side]
        fitted = _refit(fixed, factors[1 - side], factors[side])
        try:
            values = quantize_rows(fitted, module.gains, step)
        except SettingsError:  # the coded rows are so close to dependent that the fit explodes
            break
        pair = (values, module.values[1]) if side == 0 else (module.values[0], values)
        module = with_models(module.gains, *pair, module.kept)
        if not module.rank:
            break
        restored = restore_module(module, step)
        cost = _cost(module, factors, restored, weights)
        if cost < least:
            best, least = module, cost
        elif turn:
            break
    return best


def rows_squared_error(down: np.ndarray, up: np.ndarray, coded_down: np.ndarray, coded_up: np.ndarray, kept: np.ndarray) -> float:
    """||up^T down - up'^T down'||_F^2, of rows down (k, n), up (k, m) and coded rows of the components kept (p,).

    From up^T down - up'^T down' = (up - up')^T down + up'^T (down - down'), so that small errors lose no digits.
    """
    scales = [float(np.abs(rows).max(initial=0)) or 1.0 for rows in (down, up)]
    down, up = down / np.float32(scales[0]), up / np.float32(scales[1])
    coded_down, coded_up = coded_down / np.float32(scales[0]), coded_up / np.float32(scales[1])
    lost_down, lost_up = down.copy(), up.copy()
    lost_down[kept] -= coded_down
    lost_up[kept] -= coded_up
    error = _trace(lost_up @ lost_up.T, down @ down.T) + _trace(coded_up @ coded_up.T, _gram(lost_down[kept]))
    error += 2 * _trace(lost_up @ coded_up.T, down @ lost_down[kept].T)
    return max(error, 0.0) * scales[0] ** 2 * scales[1] ** 2


def _cost(
    module: QuantizedModule, factors: tuple[np.ndarray, np.ndarray], restored: tuple[np.ndarray, np.ndarray], weights: int
) -> float:
    error = rows_squared_error(*factors, *restored, module.kept)
    return 0.5 * float(np.log2(max(error, 1e-300))) + module.payload_bits / weights


def _refit(coded: np.ndarray, exact: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rows (p, m) that, with coded rows (p, n), come closest to the product of exact (k, n) and other (k, m)."""
    gram = _gram(coded).astype(np.float64)
    size = np.sqrt(np.diag(gram))
    unit = gram / size / size[:, None] + np.eye(len(gram)) * 1e-9
    mixing = np.linalg.solve(unit, (coded @ exact.T).astype(np.float64) / size[:, None]) / size[:, None]
    return mixing.astype(np.float32) @ other


def _gram(rows: np.ndarray) -> np.ndarray:
    return rows @ rows.T


def _trace(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.astype(np.float64) * b).sum())
