"""Modules of Gaussian factors with a chosen spectrum, and Shannon's bound for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lora_compress.quantization.entropy.codec import EntropyCoded


def module(rank: int, inputs: int, outputs: int, spectrum: Callable[[int], float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Balanced rows with sigma_i about spectrum(i), i = 1, 2, ..."""
    random = torch.Generator().manual_seed(seed)
    root = torch.tensor([spectrum(i) for i in range(1, rank + 1)]).sqrt().unsqueeze(1)
    down, up = (torch.randn(rank, width, generator=random) / width**0.5 for width in (inputs, outputs))
    return root * down, root * up


def coded_bits(encoded: EntropyCoded, layers: int | None = None) -> int:
    return 8 * sum(len(chunk) for chunk in encoded.chunks[:layers])


def dense_error(rows: tuple[Tensor, Tensor], coded: tuple[Tensor, Tensor]) -> float:
    """||dW - dW'||_F^2, from the dense matrices."""
    return float((rows[1].double().T @ rows[0].double() - coded[1].double().T @ coded[0].double()).square().sum())


def shannon_bits(rows: tuple[Tensor, Tensor], coded: tuple[Tensor, Tensor]) -> float:
    """Least bits for Gaussian factors at the error of the coded ones in sigma-scaled rows, by reverse water-filling."""
    variances, widths, error = [], [], 0.0
    sigma = rows[0].double().norm(dim=1) * rows[1].double().norm(dim=1)
    for exact, found in zip(rows, coded, strict=True):
        scaled, lost = (part.double() * sigma.sqrt().unsqueeze(1) for part in (exact, exact - found))
        variances += scaled.square().mean(dim=1).tolist()
        widths += [exact.shape[1]] * len(exact)
        error += float(lost.square().sum())
    variance, width = np.array(variances), np.array(widths)
    low, high = 0.0, float(variance.max())
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if float((np.minimum(level, variance) * width).sum()) < error else (low, level)
    return float((width * 0.5 * np.log2(np.maximum(variance / high, 1))).sum())
