"""The thin SVD of a low-rank update, from its factors alone: the dense matrix is never formed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FormatError
from .update import LowRankUpdate

__all__ = ["Spectrum", "thin_svd"]


@dataclass(frozen=True)
class Spectrum:
    """dW = sum_i sigma_i u_i v_i^T, strongest component first; alpha / r is part of sigma.

    Args:
        u: (k, out), the left singular vectors as rows.
        sigma: (k,), effective singular values, falling.
        v: (k, in * kernel), the right singular vectors as rows.
        kernel: kernel size of a convolution, () for a linear layer.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor
    kernel: tuple[int, ...] = ()

    def balanced(self, rank: int) -> tuple[Tensor, Tensor]:
        """The strongest `rank` components as (sqrt(sigma) v, sqrt(sigma) u): down (rank, in * kernel), up^T (rank, out)."""
        root = self.sigma[:rank].sqrt().unsqueeze(1)
        return self.v[:rank] * root, self.u[:rank] * root


def thin_svd(update: LowRankUpdate) -> Spectrum:
    """SVD of (alpha / r) up @ down in float64: QR of both factors, then the SVD of the small core R_up R_down^T.

    At most min(r, out, in * kernel) components come out.

    Raises:
        FormatError: a factor or alpha holds NaN or infinity.
    """
    up, down = update.up_matrix.double(), update.down_matrix.double()
    if not (torch.isfinite(up).all() and torch.isfinite(down).all() and math.isfinite(update.alpha)):
        raise FormatError("its factors or its alpha hold NaN or infinity: the training diverged, nothing can be saved from it")
    q_up, r_up = torch.linalg.qr(up)  # (out, p), (p, r)
    q_down, r_down = torch.linalg.qr(down.T)  # (in * kernel, q), (q, r)
    u, sigma, vh = torch.linalg.svd(r_up @ r_down.T * update.scale, full_matrices=False)
    return Spectrum((q_up @ u).T, sigma, vh @ q_down.T, update.kernel)
