"""Integer probability tables of the entropy codec: made by integer arithmetic alone, so that every platform has the same ones."""

from __future__ import annotations

from functools import cache
from math import isqrt

import numpy as np

__all__ = [
    "MAX_SCALE",
    "PRECISION",
    "SHAPES",
    "base_counts",
    "bit_contexts",
    "bit_counts",
    "cell_centres",
    "fine_planes",
    "normalise",
    "split_counts",
]

PRECISION = 24  # counts of a table sum to 2^24
MAX_SCALE = 56  # of a table that codes whole symbols: sigma = 14.7 steps; above, low bits are split off
_FINEST = 64  # scale up to which cells are split in finer ones to describe a bit plane
_LARGEST_SYMBOL = 255
_CELLS = 1024
_STEEP = 40  # scale up to which the density falls much within a cell of two steps
_ONE = 1 << 96  # fixed point of the recurrences
_MASS = 48  # bits of a distribution's whole mass
_LEAST_MASS = 1 << 24  # of a cell whose centre is taken from its table: below, what was rounded off is felt
_CENTRE = 12  # fractional bits of a centre

# Shapes are mixtures of Gaussians of different scale, (eighths of an octave, weight / 256): a Gaussian, and Student's t with 10,
# 5, 3 and 1.8 degrees of freedom with their inverse chi-squared scales sorted into half octaves. The last sums to 255 + 1.
_MIXTURES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 256),),
    ((-4, 43), (0, 141), (4, 63), (8, 8), (12, 1)),
    ((-8, 9), (-4, 51), (0, 80), (4, 61), (8, 32), (12, 14), (16, 6), (20, 2), (24, 1)),
    ((-12, 1), (-8, 15), (-4, 46), (0, 60), (4, 51), (8, 35), (12, 21), (16, 12), (20, 7), (24, 4), (28, 2), (32, 1), (36, 1)),
)
SHAPES = len(_MIXTURES)


def fine_planes(scale: int, plane: int) -> int:
    """Number of planes v below `plane` in which a table of `scale` (there) is described: sums over 2^v cells of scale + 8 v."""
    return min(plane, (_FINEST - scale) // 8) if scale <= MAX_SCALE else 0


@cache
def base_counts(scale: int, shape: int, fine: int) -> np.ndarray:
    """Counts of 0, +1, -1, ... +K, -K and of the escape after them, (2 K + 2,): K leaves a tail of at most 2^-17 a side.

    A symbol stands for the values of its sign with that magnitude >> fine, of a distribution of `scale` + 8 `fine`.
    """
    mass, _ = _fine(scale + 8 * fine, shape)
    cells = mass[: len(mass) >> fine << fine].reshape(-1, 1 << fine).sum(axis=1)
    cells[0] = 2 * cells[0] - mass[0]  # cell 0 reaches to both sides of zero, its middle is there once
    tails = (1 << _MASS) - cells[0] - 2 * np.cumsum(cells[1:])  # of both sides, beyond 1, 2, ...
    small = np.flatnonzero(tails <= 1 << (_MASS - 16))
    last = min(int(small[0]) + 1 if len(small) else len(cells) - 1, _LARGEST_SYMBOL, len(cells) - 1)
    return normalise([int(cells[0]), *np.repeat(cells[1 : last + 1], 2).tolist(), max(int(tails[last - 1]), 0)])


@cache
def split_counts(scale: int, shape: int, plane: int) -> np.ndarray:
    """Counts of 0, plus and minus, (3,): what a value that was zero one plane higher is at `plane`, where its scale is `scale`."""
    half = 1 << plane
    if scale > MAX_SCALE:  # as good as uniform
        return normalise([2 * half - 1, half, half])
    fine = fine_planes(scale, plane)
    mass, _ = _fine(scale + 8 * fine, shape)
    side = int(mass[1 << fine : 2 << fine].sum())
    return normalise([2 * int(mass[: 1 << fine].sum()) - int(mass[0]), side, side])


def bit_contexts(scale: int) -> int:
    """Number of tables for next bits: by magnitude where it matters."""
    return 3 if scale <= _STEEP else 1


@cache
def bit_counts(scale: int, shape: int, plane: int, context: int) -> np.ndarray:
    """Counts of a magnitude's next bit, (2,), at `plane`: `context` is the magnitude one plane higher, the last stands for more."""
    if scale > MAX_SCALE:
        return normalise([1, 1])
    fine = fine_planes(scale, plane)
    mass, _ = _fine(scale + 8 * fine, shape)
    pairs = mass[: len(mass) >> (fine + 1) << (fine + 1)].reshape(-1, 2, 1 << fine).sum(axis=2)
    chosen = pairs[context] if context < bit_contexts(scale) else pairs[context:].sum(axis=0)
    return normalise([int(chosen[0]) + 1, int(chosen[1]) + 1])


@cache
def cell_centres(scale: int, shape: int, plane: int, width: int) -> np.ndarray:
    """Centres of mass of the cells `width` planes above `plane` wide, in 2^-12 steps of `plane`; cell 0 has centre 0.

    Cells without a known distribution, beyond the table or at a scale where it is as good as uniform, have their middle.
    """
    fine = fine_planes(scale, plane)
    wide = fine + width
    if scale > MAX_SCALE:
        return np.zeros(1, dtype=np.int64)
    mass, moment = _fine(scale + 8 * fine, shape)
    count = min(len(mass) >> wide, 2 * _LARGEST_SYMBOL)
    masses = mass[: count << wide].reshape(count, -1).sum(axis=1)
    moments = moment[: count << wide].reshape(count, -1).sum(axis=1)
    rare = np.flatnonzero(masses < _LEAST_MASS)
    known = int(rare[0]) if len(rare) else count
    centres = (moments[:known] // masses[:known]) >> fine
    centres[0] = 0
    return centres


def normalise(masses: list[int]) -> np.ndarray:
    """Counts of at least 1 that sum to 2^24: 1 + floor(mass (2^24 - n) / total), the rest to the first of the largest."""
    exact = [int(mass) for mass in masses]
    total = sum(exact)
    room = (1 << PRECISION) - len(exact)
    counts = [1 + mass * room // total for mass in exact]
    counts[exact.index(max(exact))] += (1 << PRECISION) - sum(counts)
    return np.array(counts, dtype=np.int64)


@cache
def _fine(scale: int, shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Mass (cells,) and first moment (cells,) of [j - 1/2, j + 1/2] on one side, mass in 2^-48, moment in 2^-60 steps."""
    mass, moment = np.zeros(_CELLS, dtype=np.int64), np.zeros(_CELLS, dtype=np.int64)
    for shift, weight in _MIXTURES[shape]:
        cells, moments = _gaussian(scale + shift)
        mass[: len(cells)] += np.array([cell * weight >> 8 for cell in cells], dtype=np.int64)
        moment[: len(cells)] += np.array([cell * weight >> 8 for cell in moments], dtype=np.int64)
    return mass, moment


@cache
def _gaussian(scale: int) -> tuple[list[int], list[int]]:
    """Masses and moments of a Gaussian with sigma = 2^((scale - 25) / 8) steps, by the midpoint rule on 4 to 32 points a step.

    With h = 1 / (2 sigma^2 points^2), the density at (i + 1/2) / points is proportional to exp(-(i + 1/2)^2 h); each is its
    predecessor times a ratio, and each ratio its predecessor times exp(-2 h). The ends of cells lie between points.
    """
    points = 32 >> min(max((scale - 9) // 8, 0), 3)
    decay = _exponential(_two_power(26 - scale) // points**2)  # exp(-2 h), as 2 h = 2^((25 - scale) / 4) / points^2
    weight, ratio = _ONE, decay
    masses, moments = [0], [0]
    index = 0
    total = 0
    while weight and index < 1 << 16:
        cell = (index + points // 2) // points
        if cell == len(masses):
            masses.append(0)
            moments.append(0)
        masses[cell] += weight
        moments[cell] += weight * (2 * index + 1)
        total += 2 * weight
        weight, ratio, index = weight * ratio // _ONE, ratio * decay // _ONE, index + 1
    masses[0], moments[0] = 2 * masses[0], 0
    scaled = [(mass << _MASS) // total for mass in masses[:_CELLS]]
    return scaled, [(moment << (_MASS + _CENTRE)) // (2 * points * total) for moment in moments[:_CELLS]]


def _two_power(exponent: int) -> int:
    """2^((exponent - 1) / 4) in fixed point."""
    whole, quarters = divmod(exponent - 1, 4)
    root = isqrt(isqrt((1 << quarters) * _ONE**4))
    return root << whole if whole >= 0 else root >> -whole


def _exponential(exponent: int) -> int:
    """exp(-exponent) in fixed point, by the series of exp(exponent / 2^k), inverted and squared k times."""
    halvings = max(exponent.bit_length() - 93, 0)
    small = exponent >> halvings
    term = total = _ONE
    number = 0
    while term:
        number += 1
        term = term * small // (number * _ONE)
        total += term
    value = _ONE * _ONE // total
    for _ in range(halvings):
        value = value * value // _ONE
    return value
