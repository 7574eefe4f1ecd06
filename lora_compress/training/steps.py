"""Finding the steps of an optimizer that nobody hands over: through the hooks that torch calls at every step of every optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["OptimizerWatch"]


class _Follower(Protocol):
    def before_step(self) -> None: ...

    def after_step(self, optimizers: Sequence[Optimizer]) -> None: ...


class OptimizerWatch:
    """Tells a follower of each step of the optimizers that hold some of its parameters; keeps neither of them alive.

    A step that a gradient scaler skips is none; of several optimizers, the one that was seen first counts the steps. Wrappers that
    call step of another optimizer inside their own are one step.

    Args:
        follower: with before_step and after_step.
        parameters: its own.
    """

    def __init__(self, follower: _Follower, parameters: Sequence[Tensor]) -> None:
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._inside = False
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self._follower = weakref.ref(follower)
        _listen()
        _watches.add(self)

    def before(self, optimizer: Optimizer) -> None:
        """A step of any optimizer begins."""
        follower = self._follower()
        if follower is not None and self._leads(optimizer):
            self._inside = True
            follower.before_step()

    def after(self, optimizer: Optimizer) -> None:
        """A step of any optimizer has been made."""
        follower = self._follower()
        if follower is not None and self._inside and self._leads(optimizer):
            self._inside = False
            follower.after_step(self.optimizers)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that hold parameters of the follower, the leading one first."""
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    def close(self) -> None:
        """Watch no longer."""
        _watches.discard(self)

    def _leads(self, optimizer: Optimizer) -> bool:
        if optimizer in self._strangers:
            return False
        known = self.optimizers
        if not any(optimizer is other for other in known):
            ours = {id(parameter) for reference in self._parameters if (parameter := reference()) is not None}
            if not any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
                self._strangers.add(optimizer)
                return False
            self._optimizers = [weakref.ref(other) for other in (*known, optimizer)]
        return self.optimizers[0] is optimizer


_watches: weakref.WeakSet[OptimizerWatch] = weakref.WeakSet()


@cache
def _listen() -> None:
    """Once and for all: torch goes through its hooks while they are called, and a watch may be collected at any moment."""
    register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: _tell("before", optimizer))
    register_optimizer_step_post_hook(lambda optimizer, args, kwargs: _tell("after", optimizer))


def _tell(event: str, optimizer: Optimizer) -> None:
    for watch in list(_watches):
        getattr(watch, event)(optimizer)
