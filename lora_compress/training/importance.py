"""What a component is worth while the network learns: the averages that scores by gradients and by activations are made of."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["component_norms", "component_sensitivity", "rotate_averages", "update_gram", "update_sensitivity"]

_BETA = 0.85  # of both averages: AdaLoRA's defaults
_GRAM_BETA = 0.98  # a memory of some fifty batches
_MOST_ROWS = 4096  # of a batch that enter a Gram matrix


def component_sensitivity(weights: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]) -> Tensor:
    """I_i = mean_j |w_ij dL/dw_ij|, of down's row and of up's row together: (r,), float32.

    Args:
        weights: rows of down (r, in * kernel) and of up (r, out).
        gradients: likewise.
    """
    parts = [(w * g).abs().mean(dim=1, dtype=torch.float32) for w, g in zip(weights, gradients, strict=True)]
    return parts[0] + parts[1]


def update_sensitivity(averages: Tensor, value: Tensor) -> None:
    """Fold a new I into its average and into that of its uncertainty, in place.

    Ibar = b Ibar + (1 - b) I and Ubar = b Ubar + (1 - b) |I - Ibar|; the score is Ibar Ubar (AdaLoRA,
    https://arxiv.org/abs/2303.10512, equations 9 to 11), kept for components and not for weights.

    Args:
        averages: (2, r): Ibar and Ubar.
        value: (r,), I.
    """
    averages[0].lerp_(value, 1.0 - _BETA)
    averages[1].lerp_((value - averages[0]).abs(), 1.0 - _BETA)


def rotate_averages(averages: Tensor, down_map: Tensor, up_map: Tensor) -> None:
    """Averages of components that were mixed: new component i takes over |down_map_ij up_map_ij| of old component j, in place.

    The products of a row sum up to 1 but for signs, so a permutation is followed exactly.
    """
    shares = (down_map * up_map).abs()
    shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    averages.copy_(averages.double() @ shares.T.to(averages.device))


def update_gram(gram: Tensor, count: Tensor, outputs: Tensor) -> None:
    """Fold what down put out into G = E[(down x)(down x)^T], in place: a plain mean of the first batches, then an average.

    Args:
        gram: (r, r), float32.
        count: (1,), batches so far.
        outputs: (n, r).
    """
    rows = outputs[:: -(-len(outputs) // _MOST_ROWS)].float()
    count += 1
    weight = (1.0 / count).clamp_min(1.0 - _GRAM_BETA)
    gram.lerp_(rows.T @ rows / len(rows), weight)


def component_norms(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """||dW_i||_F = |scale| ||down_i|| ||up_i|| of rows down (r, in * kernel) and up (r, out): (r,), float64."""
    return down.double().norm(dim=1) * up.double().norm(dim=1) * abs(scale)
