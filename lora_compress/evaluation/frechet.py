"""The Fréchet distance between two sets of features, exact for few pictures too, and its extrapolation to infinitely many."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EvaluationError

__all__ = ["FeatureStatistics", "check_features", "frechet_distance", "frechet_infinity"]

_POINTS = 15  # sizes that the extrapolation is fitted to, as in the paper
_SMALLEST_SHARE = 0.1  # of the pictures, at the first of them


@dataclass(frozen=True)
class FeatureStatistics:
    """Number, mean and scatter of features, in float64: all that the Fréchet distance needs.

    Args:
        count: of pictures, N.
        mean: (d,).
        factor: (min(N, d) or less, d) with factor^T factor = sum_i (x_i - mean) (x_i - mean)^T. A covariance of few pictures
            is singular: its factor has no more rows than there are pictures, and none of its products is ever formed.
    """

    count: int
    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor | Iterable[Tensor]) -> FeatureStatistics:
        """Of features (N, d), or of batches of them."""
        batches = [features] if isinstance(features, Tensor) else features
        statistics: FeatureStatistics | None = None
        for batch in batches:
            statistics = _of_batch(batch) if statistics is None else statistics.update(batch)
        if statistics is None:
            raise EvaluationError("no features: there is nothing to measure")
        return statistics

    @property
    def trace(self) -> float:
        """Of the covariance, sum of squares / (N - 1)."""
        return float(self.factor.square().sum()) / (self.count - 1)

    def update(self, features: Tensor) -> FeatureStatistics:
        """With more features (N', d).

        The scatter of two groups is the sum of theirs and of n n' / (n + n') (m - m') (m - m')^T (Chan, Golub, LeVeque 1979).
        """
        other = _of_batch(features)
        if other.mean.shape != self.mean.shape:
            raise EvaluationError(f"features are {len(other.mean)} wide, those before were {len(self.mean)}: use one extractor")
        count = self.count + other.count
        shift = other.mean - self.mean
        between = shift.unsqueeze(0) * math.sqrt(self.count * other.count / count)
        factor = _shortened(torch.cat([self.factor, other.factor, between]))
        return FeatureStatistics(count, self.mean + shift * (other.count / count), factor)


def check_features(features: Tensor, least: int = 2) -> Tensor:
    """Features (N, d) as float64.

    Raises:
        EvaluationError: they are no matrix, are of fewer pictures than `least`, or hold NaN or infinity.
    """
    if features.ndim != 2:
        raise EvaluationError(f"features have the shape {tuple(features.shape)}: they are a matrix (pictures, width)")
    if len(features) < least:
        raise EvaluationError(f"{len(features)} picture{'s' * (len(features) != 1)}: a distance needs {least} or more on each side")
    if not torch.isfinite(features).all():
        raise EvaluationError("features hold NaN or infinity: the extractor failed on a picture")
    return features.double()


def frechet_distance(first: FeatureStatistics | Tensor, second: FeatureStatistics | Tensor) -> float:
    """The squared Fréchet distance of the Gaussians with these means and covariances; FID where features are Inception's.

    ||m - m'||^2 + tr S + tr S' - 2 tr (S S')^1/2. With S = F^T F / (N - 1) the last trace is the nuclear norm of F F'^T over
    sqrt((N - 1)(N' - 1)): a matrix of N x N' where pictures are fewer than features are wide, and no root of a product of
    singular matrices (Heusel et al., arXiv 1706.08500, has the distance).

    Args:
        first: statistics, or features (N, d).
        second: of the same width.

    Raises:
        EvaluationError: fewer than two pictures on a side, or widths that differ.
    """
    a, b = (FeatureStatistics.of(side) if isinstance(side, Tensor) else side for side in (first, second))
    for side in (a, b):
        if side.count < 2:
            raise EvaluationError("1 picture: a distance needs 2 or more on each side")
    if a.mean.shape != b.mean.shape:
        raise EvaluationError(f"features are {len(a.mean)} and {len(b.mean)} wide: use one extractor for both")
    crossed = float(torch.linalg.svdvals(a.factor @ b.factor.T).sum()) / math.sqrt((a.count - 1) * (b.count - 1))
    return max(float((a.mean - b.mean).square().sum()) + a.trace + b.trace - 2.0 * crossed, 0.0)


def frechet_infinity(first: Tensor, second: Tensor, *, points: int = _POINTS, seed: int = 0) -> float:
    """The Fréchet distance that infinitely many pictures would have: the value at 1/N = 0 of the line through FID(N) over 1/N.

    Its bias falls as 1/N once N is well above the width of the features (Chong and Forsyth, arXiv 1911.07023). They leave the
    reference at its full size; here both sides have N pictures, because a data set for a LoRA is as small as what is drawn.

    Args:
        first: features (N, d).
        second: (N', d).
        points: sizes to fit, evenly spread in 1/N from a tenth of the pictures, or just over the width, to all of them.
        seed: of the subsets.

    Raises:
        EvaluationError: fewer than 2 d pictures on a side: the bias does not fall as 1/N there.
    """
    first, second = check_features(first), check_features(second)
    most, width = min(len(first), len(second)), first.shape[1]
    if most < 2 * width:
        raise EvaluationError(f"{most} pictures: extrapolating features {width} wide needs {2 * width} or more on each side")
    random = torch.Generator().manual_seed(seed)
    least = max(most * _SMALLEST_SHARE, 1.2 * width)
    sizes = (1.0 / torch.linspace(1.0 / least, 1.0 / most, points, dtype=torch.float64)).round().long().tolist()
    values = []
    for size in sizes:
        subsets = [side[torch.randperm(len(side), generator=random)[:size]] for side in (first, second)]
        values.append(frechet_distance(*subsets))
    lines = torch.stack([torch.ones(points, dtype=torch.float64), 1.0 / torch.tensor(sizes, dtype=torch.float64)], dim=1)
    found = torch.linalg.lstsq(lines, torch.tensor(values, dtype=torch.float64).unsqueeze(1))
    return float(found.solution[0])


def _of_batch(features: Tensor) -> FeatureStatistics:
    features = check_features(features, least=1)
    mean = features.mean(dim=0)
    return FeatureStatistics(len(features), mean, _shortened(features - mean))


def _shortened(rows: Tensor) -> Tensor:
    """Rows with the same F^T F, no more than they are wide."""
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows
