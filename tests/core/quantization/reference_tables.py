"""The tables of docs/format_entropy.md, sections 1, 5 and 6, in plain Python as the page words them."""

from __future__ import annotations

from functools import cache
from math import isqrt

ONE = 1 << 96
MIXTURES = (
    ((0, 256),),
    ((-4, 43), (0, 141), (4, 63), (8, 8), (12, 1)),
    ((-8, 9), (-4, 51), (0, 80), (4, 61), (8, 32), (12, 14), (16, 6), (20, 2), (24, 1)),
    ((-12, 1), (-8, 15), (-4, 46), (0, 60), (4, 51), (8, 35), (12, 21), (16, 12), (20, 7), (24, 4), (28, 2), (32, 1), (36, 1)),
)


def normalise(masses: list[int]) -> list[int]:
    total = sum(masses)
    counts = [1 + mass * (2**24 - len(masses)) // total for mass in masses]
    counts[masses.index(max(masses))] += 2**24 - sum(counts)
    return counts


@cache
def uniform(count: int) -> list[int]:
    return normalise([1] * count)


def exp(y: int) -> int:
    k = max(y.bit_length() - 93, 0)
    term = whole = ONE
    i = 1
    while term > 0:
        term = term * (y >> k) // (i * ONE)
        whole += term
        i += 1
    x = ONE**2 // whole
    for _ in range(k):
        x = x**2 // ONE
    return x


@cache
def gaussian(a: int) -> tuple[list[int], list[int]]:
    points = 32 >> min(max((a - 9) // 8, 0), 3)
    w, j = divmod(25 - a, 4)
    root = isqrt(isqrt(2**j * ONE**4))
    decay = exp((root << w if w >= 0 else root >> -w) // points**2)
    mass, moment = [0] * 70000, [0] * 70000
    weight, ratio, total, i = ONE, decay, 0, 0
    while weight > 0 and i < 65536:
        cell = (i + points // 2) // points
        mass[cell] += weight
        moment[cell] += weight * (2 * i + 1)
        total += 2 * weight
        weight, ratio, i = weight * ratio // ONE, ratio * decay // ONE, i + 1
    mass[0], moment[0] = 2 * mass[0], 0
    return [x * 2**48 // total for x in mass[:1024]], [x * 2**60 // (2 * points * total) for x in moment[:1024]]


@cache
def mixture(a: int, shape: int) -> tuple[list[int], list[int]]:
    parts = [(gaussian(a + d), weight) for d, weight in MIXTURES[shape]]
    return tuple([sum(part[kind][c] * weight >> 8 for part, weight in parts) for c in range(1024)] for kind in (0, 1))  # type: ignore[return-value]


@cache
def cells(scale: int, shape: int, plane: int, v: int) -> tuple[int, int, list[int]]:
    """+0, -0, and all cells on one side."""
    mass, _ = mixture(scale + 8 * v, shape)
    sums = [sum(mass[c << v : (c + 1) << v]) for c in range(1024 >> v)]
    middle = mass[0]
    if v < plane:
        return sums[0] - middle // 2, sums[0] - middle + middle // 2, sums
    return sums[0], sums[0] - middle, sums


def symbols(zeros: list[int], cell: list[int], v: int) -> list[int]:
    last, tail = 1, 2**48 - sum(zeros) - 2 * cell[1]
    while tail > 2**32 and last < min(255, (1024 >> v) - 1):
        last += 1
        tail -= 2 * cell[last]
    return normalise([*zeros, *(cell[c] for c in range(1, last + 1) for _ in (0, 1)), max(tail, 0)])


@cache
def base(scale: int, shape: int, v: int) -> list[int]:
    plus, minus, cell = cells(scale, shape, v, v)
    return symbols([plus + minus], cell, v)


@cache
def signed(scale: int, shape: int, plane: int) -> list[int]:
    v = min(plane, (64 - scale) // 8)
    plus, minus, cell = cells(scale, shape, plane, v)
    return symbols([plus, minus], cell, v)


@cache
def bit(scale: int, shape: int, plane: int, k: int) -> list[int]:
    if scale > 56:
        return normalise([1, 1])
    plus, minus, cell = cells(scale, shape, plane, min(plane, (64 - scale) // 8))
    low = [[plus], [minus], [cell[2]], [cell[4]], cell[6::2]]
    high = [[cell[1]], [cell[1]], [cell[3]], [cell[5]], cell[7::2]]
    if scale > 40:
        return normalise([plus + minus + 2 * sum(cell[2::2]) + 1, 2 * sum(cell[1::2]) + 1])
    return normalise([sum(low[k]) + 1, sum(high[k]) + 1])


@cache
def centre(scale: int, shape: int, plane: int, symbol: int) -> float:
    """Of a signed symbol, in steps of the plane; of plane 0 without -0."""
    k, negative = divmod(symbol, 2)
    middle = k + 0.5 - 0.5 / 2**plane
    if symbol == 1:
        middle = 0.5
    if scale <= 56:
        v = min(plane, (64 - scale) // 8)
        plus, minus, cell = cells(scale, shape, plane, v)
        masses = [plus, *cell[1:]]
        _, moment = mixture(scale + 8 * v, shape)
        if k < min(1024 >> v, 510) and all(mass >= 2**24 for mass in masses[: k + 1]):
            mass = minus if symbol == 1 else masses[k]
            middle = (sum(moment[k << v : (k + 1) << v]) // mass >> v) / 4096
    return -middle if negative else middle
