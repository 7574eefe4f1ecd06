"""How sure a number is: bootstrap intervals of means over pictures, jackknife intervals of distances, the floor of a distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..errors import EvaluationError

__all__ = ["Measurement", "bootstrap_interval", "interval_of", "jackknife", "jackknife_interval", "same_size_floor"]

Distance = Callable[[Tensor, Tensor], float]
Interval = tuple[float, float]

_RESAMPLES = 2000
_GROUPS = 20


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] | None = None,
    *,
    level: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The percentile interval of a statistic of means over pictures (Efron 1979).

    Args:
        values: (N, k), what was measured of each picture, or (N,).
        statistic: from means (..., k) to (...,); None for the mean itself.
        level: share of resamples inside.
        resamples: how often N of the N pictures are drawn with replacement.
        seed: of the draws.
    """
    values = values.double().reshape(len(values), -1)  # (N, k)
    count = len(values)
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=random)
    weights = torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(resamples, count, dtype=torch.float64)
    )
    means = weights @ values / count  # (resamples, k)
    found = (means[:, 0] if statistic is None else statistic(means)).sort().values
    low, high = ((1.0 + side * level) / 2.0 for side in (-1, 1))
    return float(torch.quantile(found, low)), float(torch.quantile(found, high))


@dataclass(frozen=True)
class Measurement:
    """A number with what is known of its error.

    Args:
        value: the number itself.
        replicates: of a distance, for each of its two sets of pictures, the distances without one group of that set at a time, as
            `jackknife` returns them. Empty where they were not taken.
        deviation: standard deviation of an error that no other measurement shares; 0 for a number that is taken as exact.
    """

    value: float
    replicates: tuple[tuple[float, ...], ...] = ()
    deviation: float = 0.0


def jackknife(
    distance: Distance, first: Tensor, second: Tensor, *, groups: int = _GROUPS, seed: int = 0
) -> tuple[tuple[float, ...], ...]:
    """Returns, for each of the two sets, the distances without one random group of its pictures at a time.

    Two calls with equally many pictures and the same seed leave out the pictures of the same places. So the replicates of two
    distances can be combined one by one, and errors that both distances have in common cancel.

    Args:
        distance: of features (N, d) and (M, d).
        first: (N, d), a random sample.
        second: (M, d), likewise, independent of the first.
        groups: of a set; fewer where it has not two pictures for each.
        seed: of the groups.

    Returns:
        Two tuples of distances; () for a set of fewer than four pictures, which no two groups of two can be made of.
    """
    random = torch.Generator().manual_seed(seed)
    replicates = []
    for side, features in enumerate((first, second)):
        count = min(groups, len(features) // 2)
        order = torch.randperm(len(features), generator=random)
        without = []
        for group in order.tensor_split(count) if count >= 2 else ():
            kept = features[_complement(len(features), group)]
            without.append(distance(kept, second) if side == 0 else distance(first, kept))
        replicates.append(tuple(without))
    return tuple(replicates)


def interval_of(
    statistic: Callable[[Sequence[float]], float], measurements: Sequence[Measurement], *, level: float = 0.95
) -> Interval:
    """Returns the confidence interval of a statistic of several measurements, value -/+ t s.

    s^2 = sum over sets of (g - 1)/g sum_j (v_j - mean v)^2 by the delete-a-group jackknife, v_j being the statistic of all
    measurements without the j-th group, and to first order the errors that each measurement has for itself. Replicates of
    different numbers belong to different pictures, and count as independent.

    Args:
        statistic: from the values of all measurements, in their order, to a number.
        measurements: what it is computed from.
        level: of confidence.

    Returns:
        Its lower and upper end; infinite where a distance had too few pictures to know its error.
    """
    values = [each.value for each in measurements]
    variance, freedom = _independent_variance(statistic, measurements), math.inf
    for shape in {tuple(map(len, each.replicates)) for each in measurements if each.replicates}:
        for side, count in enumerate(shape):
            if count < 2:
                return -math.inf, math.inf
            varied = [
                statistic([e.replicates[side][j] if tuple(map(len, e.replicates)) == shape else e.value for e in measurements])
                for j in range(count)
            ]
            mean = math.fsum(varied) / count
            variance += (count - 1) / count * math.fsum((one - mean) ** 2 for one in varied)
            freedom = min(freedom, count - 1)
    if not math.isfinite(variance):
        return -math.inf, math.inf
    value, reach = statistic(values), _student_quantile((1.0 + level) / 2.0, freedom) * math.sqrt(variance)
    return value - reach, value + reach


def jackknife_interval(
    distance: Distance,
    first: Tensor,
    second: Tensor,
    *,
    value: float | None = None,
    groups: int = _GROUPS,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Returns the confidence interval of a distance by the jackknife; see `interval_of`.

    Resampling with replacement, as the bootstrap does, would put equal pictures into a set, which these distances take for a
    smaller set: their bias would grow (Quenouille 1956).

    Args:
        distance: of features (N, d) and (M, d).
        first: (N, d), a random sample.
        second: (M, d), likewise, independent of the first.
        value: of the distance, if it is known.
        groups: of a set; fewer where it has not two pictures for each.
        level: of confidence.
        seed: of the groups.
    """
    value = distance(first, second) if value is None else value
    measured = Measurement(value, jackknife(distance, first, second, groups=groups, seed=seed))
    return interval_of(lambda values: values[0], [measured], level=level)


def same_size_floor(distance: Distance, features: Tensor, size: int, *, repeats: int = 5, seed: int = 0) -> float:
    """What the distance is between two sets of `size` pictures of one source: below that no difference can be seen.

    Mean over random halvings of `features` (2 size or more, d).

    Raises:
        EvaluationError: there are fewer.
    """
    if len(features) < 2 * size:
        raise EvaluationError(f"{len(features)} pictures: the floor at {size} needs {2 * size}")
    random = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(repeats):
        order = torch.randperm(len(features), generator=random)
        values.append(distance(features[order[:size]], features[order[size : 2 * size]]))
    return math.fsum(values) / repeats


def _independent_variance(statistic: Callable[[Sequence[float]], float], measurements: Sequence[Measurement]) -> float:
    """Of errors that each measurement has for itself: half the change of the statistic from one deviation below to one above."""
    values = [each.value for each in measurements]
    variance = 0.0
    for place, each in enumerate(measurements):
        if math.isinf(each.deviation):
            return math.inf
        below, above = ([*values[:place], each.value + way * each.deviation, *values[place + 1 :]] for way in (-1, 1))
        variance += (statistic(above) - statistic(below)) ** 2 / 4 if each.deviation else 0.0
    return variance


def _complement(count: int, places: Tensor) -> Tensor:
    kept = torch.ones(count, dtype=torch.bool)
    kept[places] = False
    return kept


def _student_quantile(share: float, freedom: float) -> float:
    """Of Student's t by the expansion of Cornish and Fisher in 1 / freedom (Abramowitz and Stegun 26.7.5), from 1 degree up."""
    z = NormalDist().inv_cdf(share)
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
