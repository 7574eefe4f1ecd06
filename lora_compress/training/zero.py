"""ZeRO of DeepSpeed, stages 1 and 2: its optimizer steps on flat pieces of float32 master weights, some on each rank.

The weights themselves stay whole on every rank, so a session masks and rotates them as ever. Master weights must follow, and so
must what the optimizer remembers of them: DeepSpeed gathers and scatters both for whoever asks a weight. Gradients of single
weights are gone by the time of a step.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError

__all__ = ["check_state", "gathered_state", "is_partitioned", "listen", "parameters_of", "update_master_weights"]


def is_partitioned(optimizer: Any) -> bool:
    """Whether it is the optimizer of ZeRO, which holds another one."""
    return hasattr(optimizer, "single_partition_of_fp32_groups")


def parameters_of(optimizer: Any) -> Iterator[Tensor]:
    """The weights that an optimizer is for."""
    groups = optimizer.bit16_groups if is_partitioned(optimizer) else (group["params"] for group in optimizer.param_groups)
    for group in groups:
        yield from group


def listen(tell: Callable[[str, Any], None]) -> None:
    """Let steps of ZeRO be told as those of torch's optimizers are, if DeepSpeed is in use; a step that overflows is none."""
    if "deepspeed" in sys.modules:
        _patch(tell)


def gathered_state(optimizer: Any, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer remembers of a weight, by name, whole; what becomes of it in the loop is put back. Called by all ranks."""
    _link(optimizer, weight)
    for name in _state_names(optimizer):
        whole = weight.get_full_hp_param(name)  # type: ignore[attr-defined]
        yield name, whole
        weight.set_full_hp_param(whole, name)  # type: ignore[attr-defined]


@torch.no_grad()
def update_master_weights(optimizers: Iterable[Any], weights: Iterable[Tensor]) -> None:
    """Make the master weights, which ZeRO steps on, what the weights have become."""
    if any(is_partitioned(optimizer) for optimizer in optimizers):
        for weight in weights:
            weight.set_full_hp_param(weight.detach().float())  # type: ignore[attr-defined]


def check_state(optimizers: Iterable[Any], known: set[str]) -> None:
    """Refuse what an optimizer under ZeRO remembers, after its first step, where it cannot be carried along.

    Raises:
        SettingsError: it is not `known` by name, or not as large as the weights.
    """
    for optimizer in optimizers:
        if not is_partitioned(optimizer):
            continue
        found = _remembered(optimizer)
        if strange := {name for name, value, whole in found if (name not in known if whole else value.numel() != 1)}:
            kind = type(optimizer.optimizer).__name__
            told = f"deepspeed with {kind}: its state ({', '.join(sorted(strange))}) cannot follow pruning: use AdamW, Lion or SGD"
            raise SettingsError([told], "training")


def _link(optimizer: Any, weight: Any) -> None:
    """Tell a weight where its part of the state is: DeepSpeed does so after the step of the first group alone."""
    if weight._hp_mapping is not None:
        flat = optimizer.single_partition_of_fp32_groups[weight._hp_mapping.param_group_index]
        weight._hp_mapping.set_optim_state_fragment(flat, optimizer.optimizer.state[flat])


def _remembered(optimizer: Any) -> Iterator[tuple[str, Tensor, bool]]:
    """The tensors of its state by name, and whether they are as large as the piece of the weights that they belong to."""
    for flat in optimizer.single_partition_of_fp32_groups:
        for name, value in optimizer.optimizer.state.get(flat, {}).items():
            if isinstance(value, Tensor):
                yield name, value, value.shape == flat.shape


def _state_names(optimizer: Any) -> list[str]:
    """Of what it remembers for each weight; the same on all ranks, in one order."""
    return sorted({name for name, _, whole in _remembered(optimizer) if whole})


@functools.cache
def _patch(tell: Callable[[str, Any], None]) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    own = DeepSpeedZeroOptimizer.step

    @functools.wraps(own)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        tell("before", self)
        result = own(self, *args, **kwargs)
        tell("skipped" if self.overflow else "after", self)
        return result

    DeepSpeedZeroOptimizer.step = step
