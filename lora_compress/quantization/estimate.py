"""Size and error of an entropy-coded module at any step, from a sample of its columns: what a search for the step asks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .integers import as_array, module_gains, quantize_rows, restore_module, with_models

__all__ = ["EntropySketch", "StepEstimate", "entropy_bits"]

_COLUMNS = 256
_FITTED_BITS = 1.4  # by which a table chosen by a sample fits that sample better than the row: half a nat for scale and for shape


@dataclass(frozen=True)
class StepEstimate:
    """What a step would give: bits of the payload, squared error ||dW - dW'||_F^2, and rank; without refinement."""

    bits: float
    squared_error: float
    rank: int


class EntropySketch:
    """A sample of a module's scaled rows, from which size and error at a step are known without coding.

    Args:
        down: (k, n), rows sqrt(sigma_i) v_i.
        up: (k, m), rows sqrt(sigma_i) u_i.
        columns: columns of each factor in the sample; None takes all.
    """

    def __init__(self, down: Tensor, up: Tensor, columns: int | None = _COLUMNS) -> None:
        factors = as_array(down), as_array(up)
        kept, self._gains = module_gains(*factors)
        self._norms = [np.einsum("ij,ij->i", rows, rows, dtype=np.float64)[kept] for rows in factors]
        sqrt_gain = np.exp2(self._gains / 8)
        self._peaks = [np.abs(rows).max(axis=1, initial=0)[kept] * sqrt_gain for rows in factors]
        self._widths = [rows.shape[1] for rows in factors]
        self._sample = [rows[kept][:, _places(rows.shape[1], columns)] for rows in factors]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the sample takes."""
        return sum(rows.nbytes for rows in self._sample)

    def at(self, step: float) -> StepEstimate:
        """Bits, error and rank at a step."""
        alive = np.flatnonzero((self._peaks[0] > step / 2) & (self._peaks[1] > step / 2))
        energy = self._norms[0] * self._norms[1]
        total = float(energy.sum())
        if not len(alive):
            return StepEstimate(0.0, total, 0)
        values = [self._marked(side, alive, step) for side in (0, 1)]
        module = with_models(self._gains[alive], values[0], values[1], alive)
        spread = [width / rows.shape[1] for width, rows in zip(self._widths, values, strict=True)]
        bits = module.payload_bits
        for row_bits, factor in zip(module.bits, spread, strict=True):
            bits += (factor - 1) * float((row_bits + _FITTED_BITS).sum())
        squares = [np.zeros(len(alive)) for _ in range(6)]
        for side, restored in enumerate(restore_module(module, step)):
            exact = self._sample[side][alive].astype(np.float64)
            lost = exact - restored
            sums = (lost * lost, restored * lost, exact * lost)
            squares[3 * side : 3 * side + 3] = [part.sum(axis=1) * spread[side] for part in sums]
        lost_down, _, down_lost, lost_up, up_lost, _ = squares
        norm_down, norm_up = self._norms[0][alive], self._norms[1][alive]
        coded_up = norm_up - 2 * squares[5] + lost_up
        error = lost_up * norm_down + np.maximum(coded_up, 0) * lost_down + 2 * up_lost * down_lost
        return StepEstimate(bits, total - float(energy[alive].sum()) + float(np.maximum(error, 0).sum()), len(alive))

    def _marked(self, side: int, alive: np.ndarray, step: float) -> np.ndarray:
        """Integers of the sample; a row whose non-zero ones all lie outside the sample keeps one, so that it counts as coded."""
        values = quantize_rows(self._sample[side][alive], self._gains[alive], step)
        empty = ~values.any(axis=1)
        values[empty, 0] = 1
        return values


def entropy_bits(down: Tensor, up: Tensor, step: float) -> float:
    """Bits of the payload (layers = 1, no refinement) that `encode_entropy` makes of balanced rows, without coding them."""
    return EntropySketch(down, up, None).at(step).bits


def _places(width: int, columns: int | None) -> np.ndarray:
    """Columns of the sample: one at a pseudo-random place in each of `columns` equal stretches."""
    if columns is None or columns >= width:
        return np.arange(width)
    edges = np.arange(columns) * width // columns
    stretch = np.diff(edges, append=width)
    return edges + np.random.default_rng(width).integers(0, stretch)
