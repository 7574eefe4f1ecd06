"""How sure a number is: bootstrap intervals of means over pictures, jackknife intervals of distances, the floor of a distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from ..errors import EvaluationError

__all__ = ["bootstrap_interval", "jackknife_interval", "same_size_floor"]

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
    """value -/+ t s, with the delete-a-group jackknife's s^2 = sum over both sides of (g - 1)/g sum_j (d_j - mean d)^2.

    d_j is the distance without the j-th of g random groups of a side. Resampling with replacement, as the bootstrap does, would
    put equal pictures into a set, which these distances take for a smaller set: their bias would grow (Quenouille 1956).

    Args:
        distance: of features (N, d) and (M, d).
        first: (N, d), a random sample.
        second: (M, d), likewise, independent of the first.
        value: of the distance, if it is known.
        groups: of a side; fewer where it has not two pictures for each.
        level: of confidence.
        seed: of the groups.
    """
    random = torch.Generator().manual_seed(seed)
    value = distance(first, second) if value is None else value
    variance, freedom = 0.0, math.inf
    for side, features in enumerate((first, second)):
        count = min(groups, len(features) // 2)
        if count < 2:
            return -math.inf, math.inf
        order = torch.randperm(len(features), generator=random)
        without = []
        for group in order.tensor_split(count):
            kept = features[_complement(len(features), group)]
            without.append(distance(kept, second) if side == 0 else distance(first, kept))
        mean = math.fsum(without) / count
        variance += (count - 1) / count * math.fsum((one - mean) ** 2 for one in without)
        freedom = min(freedom, count - 1)
    reach = _student_quantile((1.0 + level) / 2.0, freedom) * math.sqrt(variance)
    return value - reach, value + reach


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
