"""What an optimizer remembers of weights that were rotated or masked: transformed where it is known, else begun anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .pairs import Pair

__all__ = ["clear_state", "rotate_state"]

_LIKE_GRADIENTS = {"exp_avg", "momentum_buffer"}  # averages of gradients: they rotate as gradients do
_LIKE_SQUARES = {"exp_avg_sq", "max_exp_avg_sq"}
_KNOWN = _LIKE_GRADIENTS | _LIKE_SQUARES


def rotate_state(optimizer: Optimizer, pair: Pair, side: int, gradient_map: Tensor) -> None:
    """Carry the state of a rotated factor along.

    Averages of gradients (exp_avg of Adam, AdamW and Lion, momentum_buffer of SGD) are transformed exactly, as they are linear.
    Averages of squares get a'_i = sum_j map_ij^2 a_j, which is exact where the gradients of components are uncorrelated. Any other
    state (8-bit blocks, factored moments, copies of the weights) is dropped, and the optimizer initialises it at its next step.

    Args:
        optimizer: whose state.
        pair: what was rotated.
        side: its factor, 0 for down, 1 for up.
        gradient_map: (r, r), what the gradient of the factor is multiplied by; see `Rotation`.
    """
    for name, value in _averages(optimizer, pair.weights[side]):
        map_ = gradient_map.square() if name in _LIKE_SQUARES else gradient_map
        pair.mix(side, value, map_)


def clear_state(optimizer: Optimizer, pair: Pair, side: int, masked: Tensor) -> None:
    """Let the optimizer forget the components `masked: (r,)` of a factor; all of the factor where its state is not known."""
    for _, value in _averages(optimizer, pair.weights[side]):
        pair.fill(side, value, masked, 0.0)


def _averages(optimizer: Optimizer, parameter: Tensor) -> Iterable[tuple[str, Tensor]]:
    """The averages that the optimizer keeps of a parameter, by name; none, and the state dropped, where it is of another kind."""
    state = optimizer.state.get(parameter)
    if not state:
        return []
    if not _is_known(state, parameter):
        del optimizer.state[parameter]
        return []
    return [(name, value) for name, value in state.items() if name in _KNOWN and value is not None]


def _is_known(state: dict[str, object], parameter: Tensor) -> bool:
    for name, value in state.items():
        if name in _KNOWN:
            if value is not None and not (
                isinstance(value, Tensor) and value.shape == parameter.shape and torch.is_floating_point(value)
            ):
                return False
        elif name != "step":
            return False
    return True
