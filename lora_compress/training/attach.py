"""What a session puts over the layers of its pairs: a weight of their own, and only while it has something to do."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .calibration import observe_inputs
from .fake import straight_through
from .importance import update_gram
from .pairs import Pair, is_convolution

if TYPE_CHECKING:
    from .session import TrainingSession

__all__ = ["Attachment"]

_GIVEN = "_given_weight"  # of a layer: a function that tells its weight


class Attachment:
    """What `weight` is, and hooks, on the layers of a session's pairs.

    While weights are masked or quantized, a layer is of a subclass whose `weight` is what it is to compute with: hosts that call
    the layer and hosts that take its weight (LyCORIS) get the same. Parameters and state_dict stay those that are trained.

    Masked components that are gone are zeros in both factors: they put out nothing and get no gradient, so nothing has to be
    done for them in the forward pass. Those that may return keep their weights; up's rows are multiplied by the mask with a
    straight-through gradient, so that their sensitivity is known, and their weights are put back after each step.
    """

    def __init__(self, session: TrainingSession) -> None:
        self._session = weakref.ref(session)
        self._patched: list[nn.Module] = []
        self._hooks: list[Any] = []
        self._samplers: list[Any] = []
        self._held: list[tuple[Pair, int, Tensor, Tensor]] = []
        self.used = False  # whether anyone has computed with what is given out here

    @property
    def session(self) -> TrainingSession:
        """The session."""
        session = self._session()
        assert session is not None
        return session

    def follow(self) -> None:
        """Put on or take off what the state of the session asks for."""
        session = self.session
        wanted = session.quantizing or (session.may_return and session.any_masked)
        if wanted and not self._patched:
            for pair in session.pairs.values():
                for side, layer in enumerate((pair.down, pair.up)):
                    layer.__dict__[_GIVEN] = functools.partial(_given, self._session, pair, side)
                    layer.__class__ = _given_class(type(layer))  # type: ignore[arg-type]
                    self._patched.append(layer)
        elif self._patched and not wanted:
            self._unpatch()
        observing = session.state.has("gram") and session.step < session.last_pruning_step
        if observing and not self._hooks:
            for pair in session.pairs.values():
                self._hooks.append(pair.down.register_forward_hook(_observer(self._session, pair)))
        elif self._hooks and not observing:
            self._hooks = _removed(self._hooks)
        sampling = session.state.has("samples") and session.timeline is not None and session.timeline.samples(session.step)
        if sampling and not self._samplers:
            for pair in session.pairs.values():
                self._samplers.append(pair.down.register_forward_pre_hook(_sampler(self._session, pair)))
        elif self._samplers and not sampling:
            self._samplers = _removed(self._samplers)

    def detach(self) -> None:
        """Give the layers back as they were."""
        self._unpatch()
        self._hooks, self._samplers = _removed(self._hooks), _removed(self._samplers)

    def effective_weight(self, pair: Pair, side: int) -> Tensor:
        """See `TrainingSession.effective_weight`."""
        session, weight = self.session, pair.weights[side]
        masked = session.may_return and session.any_masked
        if session.bare or not (session.quantizing or masked):
            return weight

        def effective(weight: Tensor) -> Tensor:
            rows = pair.rows(side, weight)
            if masked and (side == 1 or session.quantizing):
                rows = rows * session.kept(pair.name).unsqueeze(1)
            if session.quantizing and session.grid is not None:
                parameters = session.state.part(("down_grid", "up_grid")[side], pair.name)
                rows = session.grid.project(rows, parameters, (pair.name, side))
            return pair.shaped(side, rows).to(weight.dtype)

        return straight_through(weight, effective)

    def hold_masked(self) -> None:
        """Before a step: remember components that may return, which weight decay and momentum must not move."""
        self._held = []
        if not (self.session.may_return and self.session.any_masked):
            return
        for pair in self.session.pairs.values():
            masked = ~self.session.kept(pair.name)
            for side, weight in enumerate(pair.weights):
                if weight.grad is not None:
                    pair.fill(side, weight.grad, masked, 0.0)
                self._held.append((pair, side, masked, pair.pick(side, weight.data, masked)))

    def release_masked(self) -> None:
        """After a step: put them back."""
        for pair, side, masked, before in self._held:
            pair.fill(side, pair.weights[side].data, masked, before)
        self._held = []

    def _unpatch(self) -> None:
        for layer in self._patched:
            layer.__class__ = type(layer).__base__  # type: ignore[assignment]
            del layer.__dict__[_GIVEN]
        self._patched = []


def _removed(hooks: list[Any]) -> list[Any]:
    """None are left of these."""
    for hook in hooks:
        hook.remove()
    return []


def _given(session: weakref.ref[TrainingSession], pair: Pair, side: int) -> Tensor:
    current = session()
    if current is None:
        return pair.weights[side]
    current.attachment.used = True
    return current.effective_weight(pair.name, side)


@functools.cache
def _given_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the kind of a layer, of the same name, for hosts go by names."""
    return type(cls.__name__, (cls,), {"weight": property(lambda layer: layer.__dict__[_GIVEN]()), "__module__": cls.__module__})


def _observer(session: weakref.ref[TrainingSession], pair: Pair) -> Any:
    convolution = is_convolution(pair.down)

    def observe(layer: nn.Module, args: Any, outputs: Tensor) -> None:
        current = session()
        if current is not None and layer.training and torch.is_grad_enabled():
            rows = outputs.detach()
            rows = (rows.movedim(1, -1) if convolution else rows).flatten(0, -2)
            update_gram(current.state.part("gram", pair.name), current.state.part("gram_count", pair.name), rows)

    return observe


def _sampler(session: weakref.ref[TrainingSession], pair: Pair) -> Any:
    def sample(layer: nn.Module, args: Any) -> None:
        current = session()
        if current is not None and layer.training and torch.is_grad_enabled():
            observe_inputs(current, pair, args[0])

    return sample
