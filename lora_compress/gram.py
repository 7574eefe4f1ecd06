"""Inner products of the rows of a matrix with each other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["gram"]


def gram(rows: Tensor) -> Tensor:
    """rows @ rows^T, (..., r, r), of rows (..., r, n), float32 or float64, in their type.

    On the CPU by numpy, whose BLAS (syrk) computes one half and mirrors it; torch's computes both.
    """
    if rows.device.type != "cpu":
        return rows @ rows.mT
    flat = rows.detach().reshape(rows.shape[:-2].numel(), *rows.shape[-2:])
    found = torch.empty(len(flat), rows.shape[-2], rows.shape[-2], dtype=rows.dtype)
    with np.errstate(all="ignore"):  # of factors that are infinite or NaN, which whoever asked finds out
        for matrix, place in zip(flat.numpy(), found.numpy(), strict=True):
            np.matmul(matrix, matrix.T, out=place)
    return found.reshape(*rows.shape[:-1], rows.shape[-2])
