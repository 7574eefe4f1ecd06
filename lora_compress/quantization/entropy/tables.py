"""Integer probability tables of the entropy codec: made by integer arithmetic alone, so that every platform has the same ones."""

from __future__ import annotations

from functools import cache
from math import isqrt

import numpy as np

__all__ = [
    "CONTEXTS",
    "MAX_SCALE",
    "PRECISION",
    "SHAPES",
    "base_counts",
    "bit_contexts",
    "bit_counts",
    "cell_centres",
    "fine_planes",
    "normalise",
    "signed_counts",
]

PRECISION = 24  # counts of a table sum to 2^24
MAX_SCALE = 56  # of a table that codes whole symbols: sigma = 14.7 steps; above, low bits are split off
_FINEST = 64  # scale up to which cells are split in finer ones to describe a bit plane
_LARGEST_SYMBOL = 255
_CELLS = 1024
_STEEP = 40  # scale up to which the density falls much within a cell of two steps
CONTEXTS = ((0, 0), (1, 1), (2, 3), (4, 5), (6, 1 << 31))  # of next bits: the first and last signed symbol of each
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
    (plus, minus), cells = _cells(scale, shape, fine, fine)
    return _counts([plus + minus], cells)


@cache
def signed_counts(scale: int, shape: int, plane: int) -> np.ndarray:
    """Counts of +0, -0, +1, -1, ... +K, -K and of the escape after them, (2 K + 3,), of values at a `plane` above 0.

    +0 stands for 0 ... 2^plane - 1, -0 for the same without 0 and negative.
    """
    zeros, cells = _cells(scale, shape, fine_planes(scale, plane), plane)
    return _counts(list(zeros), cells)


def _counts(zeros: list[int], cells: np.ndarray) -> np.ndarray:
    tails = (1 << _MASS) - sum(zeros) - 2 * np.cumsum(cells[1:])  # of both sides, beyond 1, 2, ...
    small = np.flatnonzero(tails <= 1 << (_MASS - 16))
    last = min(int(small[0]) + 1 if len(small) else len(cells) - 1, _LARGEST_SYMBOL, len(cells) - 1)
    return normalise([*zeros, *np.repeat(cells[1 : last + 1], 2).tolist(), max(int(tails[last - 1]), 0)])


def _cells(scale: int, shape: int, fine: int, plane: int) -> tuple[tuple[int, int], np.ndarray]:
    """Masses of +0 and of -0 at a plane, and of the magnitudes 0, 1, ... on one side.

    The value 0 itself counts as positive. Where cells are described in fewer planes than there are, it is too little to count.
    """
    mass, _ = _fine(scale + 8 * fine, shape)
    cells = mass[: len(mass) >> fine << fine].reshape(-1, 1 << fine).sum(axis=1)
    plus, middle = int(cells[0]), int(mass[0])  # which reaches to both sides of zero
    return (plus, plus - middle) if fine == plane else (plus - middle // 2, plus - middle + middle // 2), cells


def bit_contexts(scale: int, plane: int) -> range | tuple[int, ...]:
    """Of next bits, by what is known: +0, -0, 1, 2, more; all as one where it does not matter. At plane 0, -0 can only be -1."""
    if scale > _STEEP:
        return range(1)
    return range(len(CONTEXTS)) if plane else (0, *range(2, len(CONTEXTS)))


@cache
def bit_counts(scale: int, shape: int, plane: int, context: int) -> np.ndarray:
    """Counts of a magnitude's next bit, (2,), at `plane`, of a context of `bit_contexts`."""
    if scale > MAX_SCALE:
        return normalise([1, 1])
    (plus, minus), cells = _cells(scale, shape, fine_planes(scale, plane), plane)
    if scale > _STEEP:
        pairs = cells[: len(cells) // 2 * 2].reshape(-1, 2).sum(axis=0).tolist()
        return normalise([2 * pairs[0] - 2 * int(cells[0]) + plus + minus + 1, 2 * pairs[1] + 1])
    if context < 2:
        return normalise([(plus, minus)[context] + 1, int(cells[1]) + 1])
    pairs = cells[: len(cells) // 2 * 2].reshape(-1, 2)
    lower, upper = (pairs[context - 1] if context < len(CONTEXTS) - 1 else pairs[context - 1 :].sum(axis=0)).tolist()
    return normalise([lower + 1, upper + 1])


@cache
def cell_centres(scale: int, shape: int, plane: int) -> tuple[np.ndarray, int]:
    """Centres of mass of magnitudes 0, 1, ... at `plane` on the positive side, and of -0, in 2^-12 steps of `plane`.

    At plane 0, zero has centre 0. Cells without a known distribution, beyond the table or at a scale where it is as good as
    uniform, have their middle: no centre is given.
    """
    if scale > MAX_SCALE:
        return np.zeros(0, dtype=np.int64), 0
    fine = fine_planes(scale, plane)
    zeros, masses = _cells(scale, shape, fine, plane)
    _, moment = _fine(scale + 8 * fine, shape)
    count = min(len(masses), 2 * _LARGEST_SYMBOL)
    moments = moment[: count << fine].reshape(count, -1).sum(axis=1)
    masses = np.array([zeros[0], *masses[1:count].tolist()], dtype=np.int64)
    rare = np.flatnonzero(masses < _LEAST_MASS)
    known = int(rare[0]) if len(rare) else count
    return (moments[:known] // masses[:known]) >> fine, int(moments[0]) // max(zeros[1], 1) >> fine


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
