"""Kernel distances between two sets of features, unbiased for any number of pictures: KID and CMMD."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import EvaluationError
from .frechet import check_features

__all__ = ["clip_mmd", "gaussian_kernel", "kernel_distance", "polynomial_kernel", "squared_mmd"]

_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0


def polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    """(x . y / d + 1)^3, (N, d) and (M, d) to (N, M); KID's, without parameters (Bińkowski et al., arXiv 1801.01401)."""
    base = first @ second.T / first.shape[1] + 1.0
    return base * base * base  # ten times faster than a power


def gaussian_kernel(first: Tensor, second: Tensor, sigma: float = _CMMD_SIGMA) -> Tensor:
    """exp(-||x - y||^2 / (2 sigma^2)), (N, d) and (M, d) to (N, M)."""
    squares = first.square().sum(dim=1, keepdim=True) + second.square().sum(dim=1) - 2.0 * first @ second.T
    return torch.exp(squares.clamp_min(0.0) / (-2.0 * sigma**2))


def squared_mmd(within_first: Tensor, within_second: Tensor, across: Tensor, *, biased: bool = False) -> float:
    """The squared maximum mean discrepancy from kernel matrices (N, N), (M, M) and (N, M).

    Mean of the first and of the second, diagonals left out, less twice the mean of the third: unbiased, so that it may be
    negative (Gretton et al., JMLR 13, lemma 6). `biased` keeps the diagonals.
    """
    means = []
    for kernel in (within_first, within_second):
        count = len(kernel)
        means.append(float(kernel.mean() if biased else (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))))
    return means[0] + means[1] - 2.0 * float(across.mean())


def kernel_distance(first: Tensor, second: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """The squared MMD with the polynomial kernel, float64; KID where features are Inception's (arXiv 1801.01401).

    Where both sides have more than `subset_size` pictures, the mean over random subsets of that size, as in the paper. Otherwise
    all pictures at once, however many there are on each side.

    Args:
        first: features (N, d).
        second: (M, d).
        subsets: how many are drawn.
        subset_size: pictures in one, of each side.
        seed: of the subsets.

    Raises:
        EvaluationError: fewer than two pictures on a side, or widths that differ.
    """
    first, second = _checked(first, second)
    if min(len(first), len(second)) <= subset_size:
        return _distance(first, second)
    random = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        drawn = [side[torch.randperm(len(side), generator=random)[:subset_size]] for side in (first, second)]
        values.append(_distance(*drawn))
    return sum(values) / subsets


def clip_mmd(first: Tensor, second: Tensor, *, sigma: float = _CMMD_SIGMA, biased: bool = False) -> float:
    """1000 times the squared MMD of features scaled to length 1 with a Gaussian kernel of width 10; CMMD where they are CLIP's.

    Jayasumana et al., arXiv 2401.09603, whose equation is the unbiased estimator; the code published with it computes the
    `biased` one, which is larger by about 1000 (1 - E k)(1/N + 1/M).

    Args:
        first: features (N, d), any length.
        second: (M, d).
        sigma: width of the kernel.
        biased: as that code.

    Raises:
        EvaluationError: as `kernel_distance`.
    """
    first, second = (torch.nn.functional.normalize(side, dim=1) for side in _checked(first, second))
    kernels = (gaussian_kernel(*sides, sigma) for sides in ((first, first), (second, second), (first, second)))
    return _CMMD_SCALE * squared_mmd(*kernels, biased=biased)


def _distance(first: Tensor, second: Tensor) -> float:
    pairs = (first, first), (second, second), (first, second)
    return squared_mmd(*(polynomial_kernel(*sides) for sides in pairs))


def _checked(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    first, second = check_features(first), check_features(second)
    if first.shape[1] != second.shape[1]:
        raise EvaluationError(f"features are {first.shape[1]} and {second.shape[1]} wide: use one extractor for both")
    return first, second
