"""From factors or a dense update to the balanced low-rank factors that come out of its singular value decomposition."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NOT_FINITE, FormatError
from ..update import LowRankUpdate
from .sketch import LARGEST_EXACT, strongest_components

__all__ = ["TAIL", "Triple", "balanced", "kron_svd", "svd_of_matrix", "svd_of_pair", "svd_of_pair_product"]

TAIL = 1e-6  # relative Frobenius norm of what is cut as numerically zero
_SMALL = 512  # below, a Householder SVD costs no more than the eigenvectors of a Gram matrix


class Triple(NamedTuple):
    """A singular value decomposition, float64, of all of a matrix or of its strongest components.

    Args:
        u: (m, k).
        sigma: (k,), falling.
        vh: (k, n).
        rest: squared Frobenius norm of what is left out; 0 where that is rounding error.
    """

    u: Tensor
    sigma: Tensor
    vh: Tensor
    rest: float = 0.0


def svd_of_matrix(matrix: Tensor) -> Triple:
    """Thin SVD of a dense (m, n) matrix, cut after its numerical rank.

    Of a large one through the eigenvectors V of the smaller Gram matrix; then u sigma = matrix @ V, so that
    u diag(sigma) V^T is the matrix up to the orthogonality of V, however small a sigma is. Of one whose smaller side exceeds
    `sketch.LARGEST_EXACT` the `sketch.MOST_COMPONENTS` strongest components alone; `rest` says what is left out.
    """
    dense = _finite(matrix.double())
    if min(dense.shape) > LARGEST_EXACT:
        u, sigma, vh, rest = strongest_components(dense)
        negligible = rest <= TAIL**2 * (rest + float(sigma.square().sum()))
        return _cut(u, sigma, vh) if negligible else Triple(u, sigma, vh, rest)
    if min(dense.shape) <= _SMALL:
        return _cut(*torch.linalg.svd(dense, full_matrices=False))
    if dense.shape[0] < dense.shape[1]:
        u, sigma, vh, _ = svd_of_matrix(dense.T)
        return Triple(vh.T, sigma, u.T)
    vectors = torch.linalg.eigh(dense.T @ dense)[1].flip(1)
    product = dense @ vectors
    sigma, order = torch.linalg.vector_norm(product, dim=0).sort(descending=True)
    return _cut(product[:, order] / torch.where(sigma > 0, sigma, 1.0), sigma, vectors[:, order].T)


def svd_of_pair(up: Tensor, down: Tensor) -> Triple:
    """Thin SVD of up (m, r) @ down (r, n), cut after its numerical rank; the product is formed only where r is no less or large."""
    if up.shape[1] >= min(up.shape[0], down.shape[1], LARGEST_EXACT + 1):
        return svd_of_matrix(up.double() @ down.double())
    q_up, r_up = torch.linalg.qr(_finite(up.double()))
    q_down, r_down = torch.linalg.qr(_finite(down.double()).T)
    u, sigma, vh, _ = _cut(*torch.linalg.svd(_finite(r_up @ r_down.T), full_matrices=False))
    return Triple(q_up @ u, sigma, vh @ q_down.T)


def svd_of_pair_product(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Triple:
    """Thin SVD of the elementwise product (U1 D1) * (U2 D2), through its factors while they are narrow.

    (U1 D1) * (U2 D2) = U D with U[o, (i, j)] = U1[o, i] U2[o, j] and D[(i, j), c] = D1[i, c] D2[j, c].
    """
    (up1, down1), (up2, down2) = first, second
    if up1.shape[1] * up2.shape[1] >= min(up1.shape[0], down1.shape[1], LARGEST_EXACT + 1):
        return svd_of_matrix((up1.double() @ down1.double()) * (up2.double() @ down2.double()))
    up = (up1.double().unsqueeze(2) * up2.double().unsqueeze(1)).flatten(1)
    down = (down1.double().unsqueeze(1) * down2.double().unsqueeze(0)).flatten(0, 1)
    return svd_of_pair(up, down)


def kron_svd(first: Triple, second: Triple) -> Triple:
    """SVD of kron(A, B) from those of A and B: its singular values are their products, its vectors kron of theirs."""
    (u1, sigma1, vh1, rest1), (u2, sigma2, vh2, rest2) = first, second
    norm1, norm2 = (float(sigma.square().sum()) for sigma in (sigma1, sigma2))
    sigma, order = (sigma1.unsqueeze(1) * sigma2).flatten().sort(descending=True)
    order = order[: _count(sigma)]
    i, j = order // len(sigma2), order % len(sigma2)
    u = (u1[:, i].unsqueeze(1) * u2[:, j]).flatten(0, 1)
    vh = (vh1[i].unsqueeze(2) * vh2[j].unsqueeze(1)).flatten(1)
    return Triple(u, sigma[: len(order)], vh, rest1 * norm2 + norm1 * rest2 + rest1 * rest2)


def balanced(svd: Triple, scale: float, inputs: int, kernel: tuple[int, ...]) -> LowRankUpdate:
    """scale * u diag(sigma) vh as an update with alpha = rank: sqrt(|scale| sigma) on each side, a negative sign in up.

    Float32, or float64 where float32 would overflow or vanish.
    """
    u, sigma, vh, rest = svd
    root = (sigma * abs(scale)).sqrt()
    down, up = vh * root.unsqueeze(1), u * (root * math.copysign(1.0, scale))
    largest = float(root.amax())
    if largest == 0.0 or 1e-15 < largest < 1e30:
        down, up = down.float(), up.float()
    rank = len(sigma)
    down = down.reshape(rank, inputs, *kernel).contiguous()
    up = up.reshape(-1, rank, *([1] * len(kernel))).contiguous()
    return LowRankUpdate(down, up, float(rank), rest * scale * scale)


def _cut(u: Tensor, sigma: Tensor, vh: Tensor) -> Triple:
    count = _count(sigma)
    return Triple(u[:, :count], sigma[:count], vh[:count])


def _count(sigma: Tensor) -> int:
    """Components without the weakest, whose norm together is at most `TAIL` of the whole; one stays in any case."""
    energy = sigma.square().flip(0).cumsum(0).flip(0)  # of each component and all weaker ones
    return max(int((energy > TAIL**2 * energy[0]).sum()), 1)


def _finite(matrix: Tensor) -> Tensor:
    if not bool(torch.isfinite(matrix).all()):
        raise FormatError(NOT_FINITE)
    return matrix
