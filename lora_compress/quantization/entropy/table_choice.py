"""Choosing the table of each row by the length of its code."""

from __future__ import annotations

from functools import cache

import numpy as np

from .tables import MAX_SCALE, PRECISION, SHAPES, base_counts, fine_planes

__all__ = ["LARGEST_SCALE", "choose_models", "row_bits"]

LARGEST_SCALE = MAX_SCALE + 8 * 14  # of a row: 2^15 points of a uniform table, sigma of 240,000 steps
_COLUMNS = 258  # magnitudes 0 .. 256, and all above
_ESCAPE_BITS = 2 + 8
_OTHER_SHAPE = 0.004  # bits per weight that a row's own shape must save


def choose_models(values: np.ndarray, *, symbols_only: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A cheap table for each row of integers (r, n), with `symbols_only` of those without low bits split off.

    Rows that share a table are coded and decoded together. So scales are even, which takes 0.003 bits per weight more on average,
    and the shape is the one that suits most rows unless another one saves more than a little.

    Returns:
        scale (r,) from 2 to LARGEST_SCALE, shape (r,), and bits (r,), float64: the length of each row's code.
    """
    rows, width = values.shape
    magnitudes = np.abs(values)
    spread = magnitudes.sum(axis=1, dtype=np.int64) * (1.2533 / max(width, 1))  # sigma, if Gaussian and wider than a step
    guess = 25 + 8 * np.log2(np.maximum(spread, 1e-3))
    highest = 0 if symbols_only else (LARGEST_SCALE - MAX_SCALE) // 8
    planes = np.clip(np.ceil((guess - MAX_SCALE - 1) / 8), 0, highest).astype(np.int64)
    scale, shape, bits = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64), np.zeros(rows)
    for plane in sorted(set(planes.tolist())):
        chosen = planes == plane
        scales = _candidates(guess[chosen], plane)
        counts = _histogram(magnitudes[chosen] >> plane if plane else magnitudes[chosen])
        first, last = ((edge - 8 * plane) // 2 - 1 for edge in (scales[0], scales[-1]))
        tables = _all_costs(plane)[: counts.shape[1], first * SHAPES : (last + 1) * SHAPES]
        costs = (counts @ tables).reshape(len(counts), len(scales), SHAPES)
        best = costs.min(axis=1)
        usual = best.sum(axis=0).argmin()
        best[:, usual] -= _OTHER_SHAPE * width
        shape[chosen] = kinds = best.argmin(axis=1)
        costs = costs[np.arange(len(kinds)), :, kinds]
        scale[chosen] = scales.start + 2 * costs.argmin(axis=1)
        bits[chosen] = costs.min(axis=1) + plane * width
    return scale, shape, bits


def row_bits(values: np.ndarray, scale: int, shape: int) -> float:
    """Length of the code of integers (n,) by a table without low bits split off."""
    return float(_costs(scale, shape, 0)[np.minimum(np.abs(values), _COLUMNS - 1)].sum())


def _candidates(guess: np.ndarray, plane: int) -> range:
    """Scales that may be the best for a row, even ones."""
    if plane:
        return range(MAX_SCALE - 6 + 8 * plane, MAX_SCALE + 1 + 8 * plane, 2)
    low = 2 if guess.min() < 30 else min(int(guess.min()), MAX_SCALE) // 2 * 2 - 20
    return range(low, min(int(max(guess.max(), 17)) + 10, MAX_SCALE) + 1, 2)


def _histogram(magnitudes: np.ndarray) -> np.ndarray:
    """How often each row of magnitudes (r, n) holds 0, 1, ..., float64 (r, at most _COLUMNS)."""
    rows = len(magnitudes)
    width = min(int(magnitudes.max(initial=0)) + 1, _COLUMNS)
    flat = np.minimum(magnitudes, width - 1) + np.arange(rows)[:, None] * width
    return np.bincount(flat.ravel(), minlength=rows * width).reshape(rows, width).astype(np.float64)


@cache
def _all_costs(plane: int) -> np.ndarray:
    """Bits of each magnitude, (_COLUMNS, models), by the tables of scale 2 (at `plane`) with each shape, of scale 4, ...

    Those of which no row makes use at that plane are left at zero.
    """
    costs = np.zeros((_COLUMNS, MAX_SCALE // 2, SHAPES))
    for scale in range(2 if plane == 0 else MAX_SCALE - 6, MAX_SCALE + 1, 2):
        for shape in range(SHAPES):
            costs[:, scale // 2 - 1, shape] = _costs(scale, shape, plane)
    return costs.reshape(_COLUMNS, -1)


@cache
def _costs(scale: int, shape: int, plane: int) -> np.ndarray:
    """Bits of each magnitude with its sign, (_COLUMNS,), but for the `plane` bits below it: zero has twice the values, less one."""
    counts = base_counts(scale, shape, fine_planes(scale, plane))
    last = (len(counts) - 2) // 2
    exact = PRECISION - np.log2(counts)
    exact[0] += np.log2((2 << plane) - 1) - plane
    escaped = 2 * np.arange(_COLUMNS - last - 1)  # symbols beyond the escape
    return np.concatenate([exact[:-1:2], exact[-1] + _ESCAPE_BITS + 8 * (escaped >= 256)])
