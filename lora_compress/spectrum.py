"""The thin SVD of a low-rank update, from its factors alone: the dense matrix is never formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .errors import NOT_FINITE, FormatError
from .update import LowRankUpdate

__all__ = ["Spectrum", "balanced_rows", "known_svd", "quick_svds", "thin_svd"]

_LEAST_PIVOT = 1e-5  # of a Cholesky factor of a Gram matrix with unit diagonal; below, its square root has lost too many digits
_TOLERANCE = 1e-9  # of the checks on what a device computed in float64
_HALVES = (torch.float16, torch.bfloat16)
_FLOAT32_RANGE = 1e15  # coefficients beyond it, or under its inverse, are applied in float64


@dataclass(frozen=True)
class Spectrum:
    """dW = sum_i sigma_i u_i v_i^T, best component first; alpha / r is part of sigma. The u_i are orthogonal.

    In a singular value decomposition the v_i are too, and best is strongest; weighted by activations they need not be. The
    vectors are kept as mixtures of the factors' own rows, which is r numbers each instead of a layer's width:
    sqrt(sigma_i) v_i^T = mix_down[i] @ down and sqrt(sigma_i) u_i = up @ mix_up[i].

    Args:
        sigma: (k,), float64, ||dW_i||_F of the components: effective singular values.
        mix_down: (k, r), float64, or float32 where they are applied in it.
        mix_up: (k, r), likewise.
        update: the update itself.
        narrow: whether the mixtures can be applied in float32, without overflow or loss of digits; found out where not given.
    """

    sigma: Tensor
    mix_down: Tensor
    mix_up: Tensor
    update: LowRankUpdate
    narrow: bool | None = None

    def __post_init__(self) -> None:
        if self.narrow is None:
            narrow = all(bool(_are_narrow(mix.unsqueeze(0))) for mix in (self.mix_down, self.mix_up))
            object.__setattr__(self, "narrow", narrow)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution, () for a linear layer."""
        return self.update.kernel

    def without_factors(self) -> Spectrum:
        """The same without the weights of the update: shapes alone, for files that are read a module at a time."""
        update = LowRankUpdate(self.update.down.to("meta"), self.update.up.to("meta"), self.update.alpha)
        return replace(self, update=update)

    def to(self, device: str) -> Spectrum:
        """The same with sigma and mixtures on a device."""
        if self.sigma.device == torch.device(device):
            return self
        return replace(self, sigma=self.sigma.to(device), mix_down=self.mix_down.to(device), mix_up=self.mix_up.to(device))

    def of(self, update: LowRankUpdate) -> Spectrum:
        """The same over the weights of `update`, which it was taken from."""
        return replace(self, update=update)

    def balanced(self, rank: int) -> tuple[Tensor, Tensor]:
        """The strongest `rank` components in the balanced basis: float32, or float64 where float32 cannot hold the factors.

        Returns:
            down (rank, in * kernel) with rows sqrt(sigma_i) v_i^T, and up^T (rank, out) with rows sqrt(sigma_i) u_i^T.
        """
        down, up = balanced_rows([self], rank)
        return down[0], up[0].contiguous()


def balanced_rows(spectra: Sequence[Spectrum], rank: int) -> tuple[Tensor, Tensor]:
    """`Spectrum.balanced` over updates of one shape at once: down (b, rank, in * kernel) and up^T (b, rank, out).

    up^T is a view of (b, out, rank), which is how files have it.
    """
    downs, ups = [s.update.down_matrix for s in spectra], [s.update.up_matrix for s in spectra]
    narrow = all(s.narrow for s in spectra) and all(rows.dtype != torch.float64 for rows in (*downs, *ups))
    dtype = torch.float32 if narrow else torch.float64
    mix_down = torch.stack([s.mix_down[:rank] for s in spectra]).to(dtype)
    mix_up = torch.stack([s.mix_up[:rank] for s in spectra]).to(dtype)
    return mix_down @ _stacked(downs, dtype), (_stacked(ups, dtype) @ mix_up.mT).mT


def thin_svd(update: LowRankUpdate) -> Spectrum:
    """SVD of dW = (alpha / r) up @ down in float64: triangular factors of up and down^T, then the SVD of their small product.

    With up = Q_u R_u and down^T = Q_d R_d, the SVD of the core (alpha / r) R_u R_d^T = U S V^T is that of dW up to the Q's.
    R comes from the Gram matrix, whose entries are exact to float64 for float16 factors: R^T R = up^T up by Cholesky, scaled
    to a unit diagonal, so that the error is relative to every sigma_i and not to the largest (Demmel and Veselic,
    https://doi.org/10.1137/0613074). Where factors are close to linear dependence, R comes from a Householder QR.
    At most min(r, out, in * kernel) components come out.

    Example:
        >>> update = LowRankUpdate(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.eye(2), alpha=2.0)
        >>> thin_svd(update).sigma.tolist()
        [3.0, 2.0]

    Raises:
        FormatError: a factor or alpha holds NaN or infinity, or the decomposition failed.
    """
    up, down = _double(update.up_matrix.T), _double(update.down_matrix)  # (r, out), (r, in * kernel)
    gram_up, gram_down = _gram(up), _gram(down)
    norm = float((gram_up * gram_down).sum()) * update.scale**2  # ||dW||_F^2
    bound = math.sqrt(float(gram_up.trace() * gram_down.trace())) * abs(update.scale)
    if not math.isfinite(norm):
        raise FormatError(NOT_FINITE)
    root_up, root_down = _triangle(gram_up, up), _triangle(gram_down, down)  # (p, r), (q, r)
    core = root_up @ root_down.T * update.scale  # (p, q)
    u, sigma, vh = _svd(core)
    count = min(up.shape[1], down.shape[1], len(sigma))
    if not abs(float(sigma.square().sum()) - norm) <= _TOLERANCE * bound**2:
        raise FormatError("the triangular factors of its weights came out wrong: compute on another device")
    return _spectrum(update, u.T[:count], sigma[:count], vh[:count], root_up, root_down)


def _svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD that is compared with what it decomposes; drivers on a GPU have returned garbage, then the CPU is asked."""
    for candidate in (core, core.cpu()):
        try:
            u, sigma, vh = torch.linalg.svd(candidate, full_matrices=False)
        except torch.linalg.LinAlgError:
            continue
        if float((u * sigma @ vh - candidate).norm()) <= _TOLERANCE * float(candidate.norm()):
            return u.to(core), sigma.to(core), vh.to(core)
    raise FormatError("its singular value decomposition failed, on the CPU too: the file may be damaged")


def quick_svds(updates: Sequence[LowRankUpdate]) -> list[Spectrum | None]:
    """`thin_svd` of updates of one shape at once, faster; None where it would not be as good.

    With G_u = up^T up, G_d = down down^T = R^T R and s = alpha / r, the eigenvectors V of s^2 R G_u R^T = V S^2 V^T are the right
    singular vectors in the basis of R, so that sqrt(S) U^T = s S^(-1/2) V^T R up^T, and its product with s up down gives the
    other side. As everything is squared, an error of eps (sigma_1 / sigma_i)^2 is left in component i: what came out is accepted
    where U and V are orthogonal to 1e-9, which full rank and singular values within three to four decades allow.

    Args:
        updates: of the same shapes.
    """
    rank, width = updates[0].rank, min(updates[0].up.shape[0], updates[0].down[0].numel() if updates[0].rank else 0)
    none: list[Spectrum | None] = [None] * len(updates)
    if not 0 < rank <= width:
        return none
    gram_up = torch.stack([_gram(update.up_matrix.T) for update in updates])  # (b, r, r); one by one, as caches are small
    gram_down = torch.stack([_gram(update.down_matrix) for update in updates])
    scale = gram_up.new_tensor([update.scale for update in updates])[:, None, None]
    norms = gram_down.diagonal(dim1=1, dim2=2).sqrt()
    factor, _ = torch.linalg.cholesky_ex(gram_down / norms.unsqueeze(1) / norms.unsqueeze(2))
    root = factor.mT * norms.unsqueeze(1)
    core = root @ gram_up @ root.mT * scale.square()
    finite = torch.isfinite(core.sum(dim=(1, 2), keepdim=True))
    try:
        values, vectors = torch.linalg.eigh(core if bool(finite.all()) else torch.where(finite, core, 0.0))  # rising
    except torch.linalg.LinAlgError:
        return none
    sigma = values.flip(1).clamp_min(0.0).sqrt()
    inverse = sigma.reciprocal().unsqueeze(2)
    mix_up = vectors.flip(2).mT @ root * (inverse.sqrt() * scale)
    product = mix_up @ gram_up
    mix_down = product * (inverse * scale)
    good = _orthogonal(product @ mix_up.mT, inverse) & _orthogonal(mix_down @ gram_down @ mix_down.mT, inverse)
    narrow = _are_narrow(mix_down) & _are_narrow(mix_up)
    if bool(narrow.all()) and all(rows.dtype != torch.float64 for update in updates for rows in (update.down, update.up)):
        mix_down, mix_up = mix_down.float(), mix_up.float()  # as they will be applied: half the memory
    found = zip(sigma, mix_down, mix_up, updates, narrow.tolist(), strict=True)
    return [Spectrum(*parts) if fine else None for parts, fine in zip(found, good.tolist(), strict=True)]


def _orthogonal(products: Tensor, inverse: Tensor) -> Tensor:
    """Whether rows sqrt(sigma_i) u_i have the Gram matrix diag(sigma), (b,); False for NaN."""
    root = inverse.sqrt()
    unit = products * root * root.mT
    unit.diagonal(dim1=1, dim2=2).sub_(1.0)
    return unit.abs_().amax(dim=(1, 2)) < _TOLERANCE


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """In float64 or float32, (b, ...)."""
    stacked = matrices[0].new_empty(len(matrices), *matrices[0].shape, dtype=dtype)
    for place, matrix in zip(stacked, matrices, strict=True):
        place.copy_(_double(matrix) if dtype == torch.float64 else matrix)
    return stacked


def known_svd(update: LowRankUpdate) -> Spectrum:
    """The spectrum of an update whose factors are its decomposition: rows sqrt(sigma_i) v_i, columns sqrt(sigma_i) u_i, falling."""
    scale = update.scale
    sigma = update.down_matrix.double().square().sum(dim=1) * abs(scale)
    if not torch.isfinite(sigma).all():
        raise FormatError(NOT_FINITE)
    mix = torch.eye(len(sigma), dtype=torch.float64, device=sigma.device) * abs(scale) ** 0.5
    return Spectrum(sigma, mix, mix * math.copysign(1.0, scale), update)


def _double(rows: Tensor) -> Tensor:
    """In float64; half the time of one conversion for float16, which torch does not vectorize."""
    return rows.float().double() if rows.dtype in _HALVES else rows.double()


def _gram(rows: Tensor) -> Tensor:
    """rows @ rows^T, (r, r), float64. On the CPU by numpy, whose BLAS (syrk) computes one half and mirrors it."""
    rows = _double(rows)
    if rows.device.type != "cpu":
        return rows @ rows.T
    matrix = rows.detach().numpy()
    with np.errstate(all="ignore"):  # of factors that are infinite or NaN, which whoever asked finds out
        return torch.from_numpy(matrix @ matrix.T)


def _triangle(products: Tensor, rows: Tensor) -> Tensor:
    """R of rows^T = Q R, (p, r), from rows (r, n) and their Gram matrix (r, r)."""
    norms = products.diagonal().sqrt()
    if len(norms) and bool((norms > 0).all()):
        factor, failed = torch.linalg.cholesky_ex(products / norms / norms.unsqueeze(1))
        if not int(failed) and float(factor.diagonal().min()) > _LEAST_PIVOT:
            return factor.T * norms
    return torch.linalg.qr(rows.T, mode="r").R


def _spectrum(update: LowRankUpdate, u: Tensor, sigma: Tensor, vh: Tensor, root_up: Tensor, root_down: Tensor) -> Spectrum:
    """From u (k, p), sigma (k,) and vh (k, q) of the core: u_i^T R_u down = sigma_i / scale v_i^T, and likewise on the other side.

    No triangle is inverted: only sigma is, and a component whose sigma is rounding error is left empty.
    """
    real = sigma > sigma[:1] * torch.finfo(torch.float64).eps
    weights = torch.where(real, sigma, 1.0).rsqrt().where(real, 0.0).unsqueeze(1) * update.scale
    return Spectrum(torch.where(real, sigma, 0.0), (u * weights) @ root_up, (vh * weights) @ root_down, update)


def _are_narrow(mixtures: Tensor) -> Tensor:
    """Whether float32 can hold the coefficients by which rows count, (b,), of mixtures (b, k, r)."""
    largest = mixtures.abs().amax(dim=1) if mixtures.shape[1] else mixtures.new_zeros(len(mixtures), 1)
    least = torch.where(largest > 0, largest, 1.0)
    return ((largest < _FLOAT32_RANGE) & (least > 1 / _FLOAT32_RANGE)).all(dim=1)
