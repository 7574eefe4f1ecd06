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
def cells(scale: int, shape: int, plane: int) -> list[int]:
    v = min(plane, (64 - scale) // 8)
    mass, _ = mixture(scale + 8 * v, shape)
    sums = [sum(mass[c << v : (c + 1) << v]) for c in range(1024 >> v)]
    return [2 * sums[0] - mass[0], *sums[1:]]


@cache
def base(scale: int, shape: int, v: int) -> list[int]:
    cell = cells(scale, shape, v)
    last, tail = 1, 2**48 - cell[0] - 2 * cell[1]
    while tail > 2**32 and last < min(255, (1024 >> v) - 1):
        last += 1
        tail -= 2 * cell[last]
    return normalise([cell[0], *(cell[c] for c in range(1, last + 1) for _ in (0, 1)), max(tail, 0)])


@cache
def split(scale: int, shape: int, plane: int) -> list[int]:
    if scale > 56:
        return normalise([2 ** (plane + 1) - 1, 2**plane, 2**plane])
    cell = cells(scale, shape, plane)
    return normalise([cell[0], cell[1], cell[1]])


@cache
def bit(scale: int, shape: int, plane: int, k: int) -> list[int]:
    if scale > 56:
        return normalise([1, 1])
    cell = cells(scale, shape, plane)
    last = k == (3 if scale <= 40 else 1)
    ks = [each for each in range(k, len(cell) // 2) if last or each == k]
    return normalise([sum(cell[2 * each] for each in ks) + 1, sum(cell[2 * each + 1] for each in ks) + 1])


@cache
def centre(scale: int, shape: int, plane: int, u: int, k: int) -> float:
    middle = (k + 0.5) * 2**u - 0.5 / 2**plane
    if scale > 56:
        return middle
    v = min(plane, (64 - scale) // 8)
    mass, moment = mixture(scale + 8 * v, shape)
    spans = [slice(c << (v + u), (c + 1) << (v + u)) for c in range(k + 1)]
    if k >= min(1024 >> (v + u), 510) or any(sum(mass[span]) < 2**24 for span in spans):
        return middle
    return (sum(moment[spans[k]]) // sum(mass[spans[k]]) >> v) / 4096
