"""The strongest components of a matrix that is too large for its whole decomposition, in bounded time.

The range finder with power iterations of Halko, Martinsson and Tropp (https://doi.org/10.1137/090771806, algorithm 4.4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..parallel import stop_if_cancelled

__all__ = ["LARGEST_EXACT", "MOST_COMPONENTS", "converted", "largest_rank", "strongest_components"]

LARGEST_EXACT = 2048  # smaller side of a matrix; decomposing all of it takes seconds, and eight times as long at twice the size
MOST_COMPONENTS = 512  # of a larger one; a LoRA of a higher rank saves little against the difference itself
_STRONGEST_ALONE = (
    f" where its rank is at most {MOST_COMPONENTS}; of a layer whose sides both exceed {LARGEST_EXACT} no more components are read,"
    " and what they leave out counts as error"
)
_OVERSAMPLING = 32  # columns beyond those that are wanted, which make the weakest of them accurate
_ITERATIONS = 2
_COLUMNS = 64  # of a product at once; in between a user may interrupt


def largest_rank(*bounds: int) -> int:
    """Components that are found at most of a matrix whose rank is bounded by its sides and by those of its factors."""
    return min(bounds) if min(bounds) <= LARGEST_EXACT else MOST_COMPONENTS


def converted(text: str, *bounds: int) -> str:
    """A note on a conversion that is exact where no more than the strongest components are left out, made true for all."""
    return text if min(bounds) <= LARGEST_EXACT else text + _STRONGEST_ALONE


def strongest_components(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """The strongest components of a dense matrix (m, n), float64: nearly those of its singular value decomposition.

    With the orthonormal columns Q that the iterations find, Q Q^T matrix is decomposed exactly. What that leaves out is
    orthogonal to it, so that its norm follows from ||matrix||_F^2, whatever the quality of Q. The same matrix always gives the
    same result.

    Returns:
        u (m, k), sigma (k,), vh (k, n) and the squared Frobenius norm of what is left out, k = `MOST_COMPONENTS`.
    """
    largest = float(matrix.abs().amax()) or 1.0
    rough = (matrix / largest).float()  # accurate enough to find the directions
    random = torch.randn(matrix.shape[1], MOST_COMPONENTS + _OVERSAMPLING, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(_product(rough, random)).Q
    for step in range(_ITERATIONS):
        basis = torch.linalg.qr(_product(rough.T, basis)).Q
        last = step == _ITERATIONS - 1
        basis = torch.linalg.qr(_product(matrix, basis.double()) / largest if last else _product(rough, basis)).Q
    core = _product(matrix.T, basis).T / largest  # (k, n)
    triangle = torch.linalg.qr(core.T)  # core = R^T Q^T
    u, sigma, vh = torch.linalg.svd(triangle.R.T)
    u, sigma, vh = u[:, :MOST_COMPONENTS], sigma[:MOST_COMPONENTS], vh[:MOST_COMPONENTS]
    whole = float((matrix / largest).square().sum())
    rest = max(whole - float(sigma.square().sum()), 0.0)
    return basis @ u, sigma * largest, vh @ triangle.Q.T, rest * largest * largest


def _product(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix @ columns, some columns at a time."""
    result = matrix.new_empty(matrix.shape[0], columns.shape[1])
    for first in range(0, columns.shape[1], _COLUMNS):
        stop_if_cancelled()
        result[:, first : first + _COLUMNS] = matrix @ columns[:, first : first + _COLUMNS]
    return result
