"""What an optimizer remembers of weights that were rotated or masked: transformed where it is known, else begun anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["clear_rows", "holds", "rotate_state"]

_LIKE_GRADIENTS = {"exp_avg", "momentum_buffer"}  # averages of gradients: they rotate as gradients do
_LIKE_SQUARES = {"exp_avg_sq", "max_exp_avg_sq"}

Rows = Callable[[Tensor], Tensor]  # a view of a weight-shaped tensor with a row for each component


def holds(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether the optimizer updates `parameter`."""
    return any(parameter is other for group in optimizer.param_groups for other in group["params"])


def rotate_state(optimizer: Optimizer, parameter: Tensor, gradient_map: Tensor, rows: Rows) -> None:
    """Carry the state of a rotated parameter along.

    Averages of gradients (exp_avg of Adam, AdamW and Lion, momentum_buffer of SGD) are transformed exactly, as they are linear.
    Averages of squares get a'_i = sum_j map_ij^2 a_j, which is exact where the gradients of components are uncorrelated. Any other
    state (8-bit blocks, factored moments, copies of the weights) is dropped, and the optimizer initialises it at its next step.

    Args:
        optimizer: whose state.
        parameter: the rotated weight.
        gradient_map: (r, r), what its gradient is multiplied by; see `Rotation`.
        rows: view with a row for each component.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    if not _is_known(state, parameter):
        del optimizer.state[parameter]
        return
    for name, value in state.items():
        if name in _LIKE_GRADIENTS | _LIKE_SQUARES and value is not None:
            map_ = gradient_map.square() if name in _LIKE_SQUARES else gradient_map
            view = rows(value)
            view.copy_(map_.to(view.device) @ view.double())


def clear_rows(optimizer: Optimizer, parameter: Tensor, masked: Tensor, rows: Rows) -> None:
    """Let the optimizer forget the components `masked: (r,)` of a parameter; all of it where its state is not known."""
    state = optimizer.state.get(parameter)
    if not state:
        return
    if not _is_known(state, parameter):
        del optimizer.state[parameter]
        return
    for name, value in state.items():
        if name in _LIKE_GRADIENTS | _LIKE_SQUARES and value is not None:
            rows(value)[masked.to(value.device)] = 0.0


def _is_known(state: dict[str, object], parameter: Tensor) -> bool:
    for name, value in state.items():
        if name in _LIKE_GRADIENTS | _LIKE_SQUARES:
            if value is not None and not (
                isinstance(value, Tensor) and value.shape == parameter.shape and torch.is_floating_point(value)
            ):
                return False
        elif name != "step":
            return False
    return True
