"""A rank for one module by its own spectrum: sd-scripts' criteria, energy, and the knee of the log spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dynamic_rank", "knee_rank"]

_NUMERICAL_ZERO = 1e-7  # of the largest: what is below is rounding of float32 factors, not a component
_ROUNDING = 1e-12  # a share that is met but for the rounding of a float64 sum is met


def dynamic_rank(scores: Tensor, method: str, param: float | None = None) -> int:
    """The least number of components that meets `param`; 0 only where all scores are 0.

    - sv_ratio p: the components with sigma_i > sigma_1 / p, and always the first.
    - sv_cumulative p: the least k with sum_{i<=k} sigma_i >= p sum_i sigma_i.
    - sv_fro p: the least k with sum_{i<=k} sigma_i^2 >= p^2 sum_i sigma_i^2.
    - energy p: the least k with sum_{i<=k} sigma_i^2 >= p sum_i sigma_i^2.
    - knee: `knee_rank` with sensitivity p (default 1).

    The sv_* criteria are those of sd-scripts' networks/resize_lora.py, with which v0.11.1 agrees. Before that release its code
    kept one component more than asked and never fewer than two.

    Args:
        scores: (k,), falling.
        method: a name of `settings.DYNAMIC_METHODS`.
        param: as the method says; only knee has a default.
    """
    values = scores.double()
    if not len(values) or float(values[0]) <= 0.0:
        return 0
    if method == "knee":
        return knee_rank(values, 1.0 if param is None else param)
    if param is None:
        raise ValueError(f"{method} needs a param")
    if method == "sv_ratio":
        return max(1, int((values > values[0] / param).sum()))
    if method == "sv_cumulative":
        return _least_prefix(values, param)
    return _least_prefix(values.square(), {"sv_fro": param**2, "energy": param}[method])


def knee_rank(scores: Tensor, sensitivity: float = 1.0) -> int:
    """Components before the knee of log sigma over i; all of them where the log spectrum is as good as straight.

    Kneedle (Satopaa, Albrecht, Irwin, Raghavan, "Finding a Kneedle in a Haystack", ICDCSW 2011) on x = i / (k - 1) and
    y = log sigma scaled to [0, 1], unsmoothed, as a sorted spectrum needs no smoothing: the knee is where y is farthest from the
    chord 1 - x, and counts if it is farther than sensitivity / (k - 1), the paper's threshold for evenly spaced x. Above the
    chord (a plateau that breaks off) the component at the knee is the last one kept; below it (a fall that ends in a floor) it
    is the first of the floor, and goes.

    Args:
        scores: (k,), falling. What is below 1e-7 of the first counts as zero and goes.
        sensitivity: S of the paper.
    """
    values = scores.double()
    values = values[values > values[:1] * _NUMERICAL_ZERO]
    count = len(values)
    logs = values.log()
    if count < 3 or float(logs[0] - logs[-1]) <= 0.0:
        return count
    distance = (logs - logs[-1]) / (logs[0] - logs[-1]) - torch.linspace(1.0, 0.0, count, dtype=torch.float64)
    knee = int(distance.abs().argmax())
    if float(distance[knee].abs()) <= sensitivity / (count - 1):
        return count
    return knee + 1 if float(distance[knee]) > 0.0 else knee


def _least_prefix(weights: Tensor, share: float) -> int:
    """The least k whose first k weights hold `share` of their sum."""
    sums = weights.cumsum(0)
    return 1 + int((sums < share * sums[-1] * (1.0 - _ROUNDING)).sum())
