"""Components by what they change in a layer's outputs, not in its weights: the SVD of dW C^(1/2) from the factors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NOT_FINITE, FormatError
from ..update import LowRankUpdate

__all__ = ["WeightedSpectrum", "diagonal_gram", "weighted_spectrum"]

_FLOOR = 1e-10  # of the largest eigenvalue of the Gram matrix: directions that no activation reached come last, but keep a place
_ZERO = 1e-14  # of the largest: below, a component is rounding


class WeightedSpectrum(NamedTuple):
    """Components that are best first under the activations: down_i = mix_down[i] @ down, up_i = mix_up[i] @ up^T.

    Args:
        sigma: (k,), float64, falling: RMS of the output that component i makes, sqrt(E||dW_i x||^2).
        mix_down: (k, r), float64.
        mix_up: (k, r), float64; row i of both factors has the same norm.
        norms: (k,), float64, ||dW_i||_F. The up_i are orthogonal, so that the squares add up to ||dW||_F^2.
    """

    sigma: Tensor
    mix_down: Tensor
    mix_up: Tensor
    norms: Tensor


def weighted_spectrum(update: LowRankUpdate, gram: Tensor, floor: float = _FLOOR) -> WeightedSpectrum:
    """Components of dW whose first k minimise ||(dW - dW') C^(1/2)||_F over all dW' of rank k; C = E[x x^T], x the layer's inputs.

    With dW = s up @ down, s = alpha / r, only G = down C down^T = E[(down x)(down x)^T] enters: ||dW C^(1/2)||_F^2 =
    ||s up G^(1/2)||_F^2. With G = L L^T and up = Q R, the SVD A S B^T of the (r, r) core s R L gives u_i = Q a_i, and the best
    dW' of rank k is the projection of dW on u_1..u_k (Eckart and Young): dW'_i = u_i (u_i^T dW) = u_i (s a_i^T R) down. (CLoQ,
    https://arxiv.org/abs/2501.18475, and QERA, https://arxiv.org/abs/2410.06040, weigh the errors of a quantized base so.)

    G is singular where calibration never reached a direction of `down`; its eigenvalues are lifted to `floor` times the largest,
    so that such directions rank last and all components together still make dW; that adds at most floor ||G||_2 ||s up||_F^2 to
    the squared error of any k. Neither dW nor C is formed.

    Args:
        update: the module.
        gram: G, (r, r), on any device.
        floor: least eigenvalue / largest.

    Raises:
        FormatError: G has the wrong shape, or is not symmetric, finite and positive.
    """
    up, down = update.up_matrix.double(), update.down_matrix.double()
    roots = _root(gram.to(down), update.rank, floor)  # L, (r, r)
    triangle = torch.linalg.qr(up, mode="r").R * update.scale  # s R, (p, r)
    a, sigma, bt = torch.linalg.svd(triangle @ roots, full_matrices=False)
    if not bool(torch.isfinite(sigma).all()):
        raise FormatError(NOT_FINITE)
    alive = sigma > sigma[:1] * _ZERO
    mix_down = (a.T @ triangle) * alive.unsqueeze(1)  # (k, r): rows u_i^T dW over down
    mix_up = torch.where(alive, update.scale / sigma, 0.0).unsqueeze(1) * (bt @ roots.T)  # (k, r): rows u_i over up^T
    norms = (mix_down @ torch.linalg.qr(down.T, mode="r").R.T).norm(dim=1)  # by QR: from a Gram matrix zeros would be 1e-8
    alive = (norms > norms.max() * _ZERO if len(norms) else alive).unsqueeze(1)
    balance = norms.sqrt().unsqueeze(1)
    mix_down, mix_up = torch.where(alive, mix_down / balance, 0.0), torch.where(alive, mix_up * balance, 0.0)
    return WeightedSpectrum(sigma, mix_down, mix_up, norms)


def diagonal_gram(update: LowRankUpdate, diagonal: Tensor) -> Tensor:
    """G = down diag(c) down^T, (r, r): what is left of the Gram matrix where only the diagonal of C is known.

    Args:
        update: the module.
        diagonal: c, mean squares of the inputs: (in * kernel,), or (in,) for all taps of a kernel alike.

    Raises:
        FormatError: c has the wrong length, or is negative or not finite.
    """
    down = update.down_matrix.double()
    taps = max(math.prod(update.kernel), 1)
    if diagonal.numel() * taps == down.shape[1]:
        diagonal = diagonal.flatten().repeat_interleave(taps)
    if diagonal.numel() != down.shape[1]:
        raise FormatError(
            f"a diagonal of {diagonal.numel()} second moments for {down.shape[1]} inputs: record the calibration anew"
        )
    if not bool((torch.isfinite(diagonal) & (diagonal >= 0)).all()):
        raise FormatError("second moments that are negative or not finite: record the calibration anew")
    return (down * diagonal.to(down).flatten()) @ down.T


def _root(gram: Tensor, rank: int, floor: float) -> Tensor:
    """L with L L^T = G, its eigenvalues lifted to the floor."""
    if tuple(gram.shape) != (rank, rank):
        raise FormatError(f"a Gram matrix of shape {tuple(gram.shape)} for rank {rank}: record the calibration anew")
    largest = float(gram.abs().max()) if rank else 0.0
    if not math.isfinite(largest) or float((gram - gram.T).abs().max() if rank else 0.0) > 1e-3 * largest:
        raise FormatError("a Gram matrix that is not symmetric and finite: record the calibration anew")
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    if rank and float(values[0]) < -1e-3 * largest:
        raise FormatError("a Gram matrix with a negative eigenvalue: record the calibration anew")
    top = float(values[-1]) if rank else 0.0
    if top <= 0.0:  # nothing ever reached this module: all directions alike
        return torch.eye(rank, dtype=torch.float64, device=gram.device) * math.sqrt(torch.finfo(torch.float32).tiny)
    return vectors * values.clamp_min(floor * top).sqrt()
