"""The balanced form of a live pair: factors whose rows are components, the update unchanged to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..spectrum import thin_svd
from ..update import LowRankUpdate
from ..weighting import weighted_spectrum

__all__ = ["Rotation", "balanced_rotation", "complete_rotation"]

_UNUSED = 1e-6  # of the largest: a component below it is the rounding of factors in float32


@dataclass(frozen=True)
class Rotation:
    """down' = down_map @ down, up'^T = up_map @ up^T: new components as mixtures of the old, up' down' = up down.

    The maps are inverse transposes of each other, and so each is what the gradient of the other factor goes by:
    dL/ddown' = up_map @ dL/ddown, dL/dup'^T = down_map @ dL/dup^T.

    Args:
        down_map: (r, r), float64.
        up_map: (r, r), float64; down_map @ up_map^T = 1.
        scores: (r,), float64: what each new component is worth, falling; 0 for unused ones, which come last.
    """

    down_map: Tensor
    up_map: Tensor
    scores: Tensor


def balanced_rotation(update: LowRankUpdate, gram: Tensor | None = None) -> Rotation:
    """Components of equal norm in both factors: those of the SVD, or those that are best under `gram`.

    Rows become sqrt(sigma_i / |s|) v_i and sqrt(sigma_i / |s|) u_i with s = alpha / r, so that s up' down' is dW again. Where dW
    has fewer than r components (up = 0 at the start of a training), the other rows are filled up by `complete_rotation`.

    Args:
        update: the pair, on the CPU.
        gram: (r, r), E[(down x)(down x)^T]; the scores are then the RMS of what components put out.

    Raises:
        FormatError: a factor holds NaN or infinity.
    """
    if gram is None:
        spectrum = thin_svd(update)
        scores, mix_down, mix_up = spectrum.sigma, spectrum.mix_down, spectrum.mix_up
        strength = scores
    else:
        scores, mix_down, mix_up, strength = weighted_spectrum(update, gram)
    share = abs(update.scale) or 1.0
    used = strength > strength[:1].abs().max() * _UNUSED if len(strength) else strength.bool()
    down_map = mix_down[used] / share**0.5
    up_map = mix_up[used] * (1.0 if update.scale >= 0 else -1.0) / share**0.5
    full_down, full_up = complete_rotation(down_map, up_map)
    missing = update.rank - len(down_map)
    return Rotation(full_down, full_up, torch.nn.functional.pad(scores[used], (0, missing)))


def complete_rotation(down_map: Tensor, up_map: Tensor) -> tuple[Tensor, Tensor]:
    """Fill maps (k, r) with down_map @ up_map^T = 1 up to (r, r) inverse transposes.

    New rows C of the map of down are an orthonormal basis of what is orthogonal to up_map's rows; those of up follow. Then
    s (up D)(C down) is what the k components leave of dW, so C down stays of the size of down's rows while up D is nothing: such
    a component adds nothing and learns as one of a new LoRA does.
    """
    k, r = down_map.shape
    if k == r:
        return down_map, up_map
    eye = torch.eye(r, dtype=torch.float64)
    rest = _null_space(up_map) if k else eye  # C, (r - k, r)
    basis = _null_space(down_map) if k else eye  # N, (r - k, r)
    partner = torch.linalg.solve(basis @ rest.T, basis)  # D^T with C D = 1: rows of the null space of down_map
    return torch.cat([down_map, rest]), torch.cat([up_map, partner])


def _null_space(rows: Tensor) -> Tensor:
    """Orthonormal (r - k, r) orthogonal to the k independent rows."""
    return torch.linalg.qr(rows.T, mode="complete").Q[:, len(rows) :].T
