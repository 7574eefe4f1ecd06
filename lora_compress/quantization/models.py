"""Choosing the table of each row by the length of its code."""

from __future__ import annotations

from functools import cache

import numpy as np

from .schedule import lowest_symbol_plane
from .tables import MAX_SCALE, PRECISION, SHAPES, base_counts, fine_planes

__all__ = ["LARGEST_SCALE", "choose_models"]

LARGEST_SCALE = MAX_SCALE + 8 * 14  # of a row: 2^15 points of a uniform table, sigma of 240,000 steps
_COLUMNS = 258  # magnitudes 0 .. 256, and all above
_ESCAPE_BITS = 2 + 8


def choose_models(values: np.ndarray, *, symbols_only: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cheapest table for each row of integers (r, n), with `symbols_only` of those without low bits split off.

    Returns:
        scale (r,) from 1 to LARGEST_SCALE, shape (r,), and bits (r,), float64: the length of each row's code.
    """
    rows, width = values.shape
    magnitudes = np.abs(values)
    spread = magnitudes.mean(axis=1, dtype=np.float64) * 1.2533  # sigma, if Gaussian and wider than a step
    guess = 25 + 8 * np.log2(np.maximum(spread, 1e-3))
    highest = 0 if symbols_only else (LARGEST_SCALE - MAX_SCALE) // 8
    planes = np.clip(np.ceil((guess - MAX_SCALE + 1) / 8), 0, highest).astype(np.int64)
    scale, shape, bits = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64), np.zeros(rows)
    for plane in np.unique(planes).tolist():
        chosen = np.flatnonzero(planes == plane)
        candidates = _candidates(guess[chosen], plane)
        costs = _lengths(magnitudes[chosen] >> plane, [(s - 8 * plane, h, plane) for s, h in candidates])
        best = costs.argmin(axis=1)
        scale[chosen] = [candidates[index][0] for index in best]
        shape[chosen] = [candidates[index][1] for index in best]
        bits[chosen] = costs[np.arange(len(chosen)), best] + plane * width
    return scale, shape, bits


def _candidates(guess: np.ndarray, plane: int) -> list[tuple[int, int]]:
    if plane:
        scales = range(MAX_SCALE - 7 + 8 * plane, MAX_SCALE + 1 + 8 * plane)
    else:
        low = 1 if guess.min() < 30 else min(int(guess.min()), MAX_SCALE) - 20
        scales = range(low, min(int(max(guess.max(), 17)) + 10, MAX_SCALE) + 1)
    return [(scale, shape) for scale in scales for shape in range(SHAPES) if lowest_symbol_plane(scale) == plane]


def _lengths(magnitudes: np.ndarray, models: list[tuple[int, int, int]]) -> np.ndarray:
    """Bits (r, models) of rows (r, n) of magnitudes by each model."""
    rows = len(magnitudes)
    width = min(int(magnitudes.max(initial=0)) + 1, _COLUMNS)
    flat = np.minimum(magnitudes, width - 1) + np.arange(rows)[:, None] * width
    histogram = np.bincount(flat.ravel(), minlength=rows * width).reshape(rows, width)
    return histogram.astype(np.float64) @ np.stack([_costs(*model)[:width] for model in models], axis=1)


@cache
def _costs(scale: int, shape: int, plane: int) -> np.ndarray:
    """Bits of each magnitude with its sign, (_COLUMNS,)."""
    counts = base_counts(scale, shape, fine_planes(scale, plane))
    last = (len(counts) - 2) // 2
    exact = PRECISION - np.log2(counts)
    escaped = 2 * np.arange(_COLUMNS - last - 1)  # symbols beyond the escape
    return np.concatenate([exact[:-1:2], exact[-1] + _ESCAPE_BITS + 8 * (escaped >= 256)])
