"""Finding the steps of an optimizer that nobody hands over: through the hooks that torch calls at every step of every optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

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
        watch, led = weakref.ref(self), weakref.ref(follower)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            this, that = watch(), led()
            if this is not None and that is not None and this._leads(optimizer):
                this._inside = True
                that.before_step()

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            this, that = watch(), led()
            if this is not None and that is not None and this._inside and this._leads(optimizer):
                this._inside = False
                that.after_step(this.optimizers)

        self._handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        weakref.finalize(follower, _remove, self._handles)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that hold parameters of the follower, the leading one first."""
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    def close(self) -> None:
        """Watch no longer."""
        _remove(self._handles)

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


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
