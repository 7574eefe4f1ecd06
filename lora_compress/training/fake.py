"""The gradient of fake quantization: as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["straight_through"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def straight_through(weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return function(weight), with the gradient of the identity (Bengio et al., https://arxiv.org/abs/1308.3432).

    Weights beyond the last level keep their gradient too: the next search for scales brings them back onto the grid.
    """
    return _StraightThrough.apply(weight, function)
