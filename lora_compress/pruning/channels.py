"""Channels: which inputs and outputs of a layer its update hardly touches, and what leaving them out costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..update import LowRankUpdate

__all__ = ["KeptChannels", "select_channels"]


@dataclass(frozen=True)
class KeptChannels:
    """The channels of one layer that keep their update; dW is zero in the others.

    Args:
        inputs: (i,), int64, rising: indices of the kept input channels.
        outputs: (o,), int64, rising: indices of the kept output channels.
        squared_error: ||dW - dW'||_F^2 that the dropped ones cost.
        squared_norm: ||dW||_F^2.
    """

    inputs: Tensor
    outputs: Tensor
    squared_error: float
    squared_norm: float


def select_channels(update: LowRankUpdate, threshold: float) -> KeptChannels:
    """Channels c with ||dW_c||_F >= threshold * sqrt(mean_c ||dW_c||_F^2), inputs and outputs each judged on the whole dW.

    An input channel is all kernel taps that read it, an output channel a row. Norms come from the factors in float64:
    ||dW[o, :]||^2 = (up D up^T)_oo with D = s^2 down down^T, ||dW[:, j]||^2 = s^2 (down^T U down)_jj with U = up^T up, (r, r) each;
    s = alpha / r. The error is the sum over the dropped rows plus that over the dropped columns of the kept rows, so that it has
    no cancellation. As the strongest channel is never below the RMS, a threshold up to 1 leaves one of each kind.

    Args:
        update: of any kernel; of the rank that will be stored.
        threshold: share of the RMS channel norm, in [0, 1).
    """
    up, down = update.up_matrix.double(), update.down_matrix.double() * update.scale
    taps = max(torch.Size(update.kernel).numel(), 1)
    rows = _quadratic(up, down @ down.T)  # (out,), squared
    columns = _channel_norms(down, up.T @ up, taps)  # (in,), squared
    outputs, inputs = _strong(rows, threshold), _strong(columns, threshold)
    kept_up = up[outputs]
    remaining = _channel_norms(down, kept_up.T @ kept_up, taps)
    dropped_rows, dropped_columns = _others(rows, outputs), _others(remaining, inputs)
    return KeptChannels(inputs, outputs, float(dropped_rows.sum() + dropped_columns.sum()), float(rows.sum()))


def _channel_norms(down: Tensor, gram: Tensor, taps: int) -> Tensor:
    return _quadratic(down.T, gram).view(-1, taps).sum(1)


def _quadratic(rows: Tensor, gram: Tensor) -> Tensor:
    """x G x^T for each row x, (n,)."""
    return ((rows @ gram) * rows).sum(1).clamp_min(0.0)


def _strong(squared: Tensor, threshold: float) -> Tensor:
    return (squared >= threshold**2 * squared.mean()).nonzero().flatten()


def _others(squared: Tensor, kept: Tensor) -> Tensor:
    mask = torch.ones(len(squared), dtype=torch.bool, device=squared.device)
    mask[kept] = False
    return squared[mask]
