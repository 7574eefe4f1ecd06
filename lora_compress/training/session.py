"""A training under compression: attached to pairs of layers by name, led by the steps of whatever optimizer holds their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engine.in_memory import CompressedLora
from ..errors import SettingsError
from ..parallel import each_module
from ..quantization import FakeQuantizer
from ..settings import CompressionSettings
from .across import take_from_first_rank
from .attach import Attachment
from .importance import component_sensitivity, update_sensitivity
from .layout import state_layout
from .pairs import Pair
from .pruner import mask_pairs, prune_pairs, rotate_pairs
from .saving import compress_trained
from .schedule import Timeline
from .state import TrainingState
from .steps import OptimizerWatch

__all__ = ["TrainingSession"]


class TrainingSession:
    """Prunes and quantizes pairs of layers while they are trained, as the settings say, and knows what is to be saved.

    Call it before the first step; it needs no call afterwards. `close` takes everything off again.

        session = TrainingSession(find_pairs(network), settings, total_steps=1000)
        ...  # the host's own loop
        tensors = session.compress().tensors

    Args:
        pairs: by name.
        settings: what to do.
        total_steps: optimizer steps of the whole training, or a function that is asked at the first step, when hosts know it.

    Attributes:
        state: an nn.Module with all that must be saved with the network to go on later: register it there.
        timeline: when things happen; None before the first step.
        attachment: what is put over the layers.
        any_masked: whether a component has been masked.
        adaptable: whether `adapt` may change ranks and bits until scales freeze; set before the first step. Needs rank_return.
        bare: whether layers compute with their weights as they are for now; see `uncompressed`.
        remarks: more for the metadata of files, by name.
    """

    def __init__(self, pairs: Mapping[str, Pair], settings: CompressionSettings, total_steps: int | Callable[[], int]) -> None:
        if not pairs:
            raise SettingsError(["no pair of layers to train: nothing was found in the network"], "training")
        self.pairs, self.settings, self._total = dict(pairs), settings, total_steps
        self.grid: FakeQuantizer | None = settings.quantization.fake_quantizer() if settings.quantized_training.qat else None
        self.timeline: Timeline | None = None
        self.state = TrainingState(state_layout(self.pairs, settings, self.grid))
        self.state.on_load(self._loaded)
        self._step = 0  # of state.step, without asking a device
        self._quantizing = False  # of state.quantizing
        self.any_masked = self.adaptable = self.bare = False
        self.remarks: dict[str, Any] = {}
        self._due: CompressionSettings | None = None
        self.attachment = Attachment(self)
        self._watch = OptimizerWatch(self, [weight for pair in self.pairs.values() for weight in pair.weights])
        for name in self.pairs if self.state.has("kept") else ():
            self.state.part("kept", name).fill_(True)
        self.attachment.follow()

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self._step

    @property
    def calibrated(self) -> bool:
        """Whether a calibration was asked for and its inputs have been sampled: in the last tenth of the training."""
        return self.state.has("samples") and bool(self.state.batches.any())  # type: ignore[union-attr, operator]

    @property
    def quantizing(self) -> bool:
        """Whether the forward pass computes with quantized weights."""
        return self._quantizing

    @property
    def last_pruning_step(self) -> int:
        """When ranks are final; before the first step nobody knows, and it is never."""
        if not self.settings.training.iterative_pruning:
            return 0
        if self.timeline is None:
            return 1 << 62
        return max(self.timeline.pruning[-1], self.timeline.frozen if self.adaptable else 0)

    @property
    def settled(self) -> bool:
        """Whether the network is as compressed as the settings say: all of what they schedule has come about."""
        timeline = self.timeline
        return timeline is not None and self._step >= max(*timeline.pruning, timeline.quantization or 0, 0)

    @property
    def may_return(self) -> bool:
        """Whether masked components keep their weights for now: rank_return, before the last pruning step."""
        return self.settings.training.rank_return and self._step < self.last_pruning_step

    def kept(self, name: str) -> Tensor:
        """(r,) bool: the components of a pair that have not been masked."""
        if self.state.has("kept"):
            return self.state.part("kept", name)
        pair = self.pairs[name]
        return torch.ones(pair.rank, dtype=torch.bool, device=pair.weights[0].device)

    def effective_weight(self, name: str, side: int) -> Tensor:
        """The weight that a layer computes with: down's for side 0, up's for side 1; with the gradient of the live one."""
        return self.attachment.effective_weight(self.pairs[name], side)

    @contextmanager
    def uncompressed(self) -> Iterator[None]:
        """Layers compute with what is trained: not quantized, components that may return as they were when they were masked."""
        self.bare = True
        try:
            yield
        finally:
            self.bare = False

    def use(self, settings: CompressionSettings) -> None:
        """Go on as if `settings`, of other ranks or bits, had been there from the start: masks and scales stay as they are."""
        self.settings = settings
        if self.grid is not None:
            self.grid = settings.quantization.fake_quantizer()

    def adapt(self, settings: CompressionSettings) -> None:
        """Compress as `settings` say, which have other ranks or bits, from the next step on.

        Raises:
            SettingsError: this session is not adaptable.
        """
        if not self.adaptable:
            raise SettingsError(["its compression is settled from the start: set adaptable"], "training")
        self._due = settings

    def compress(self, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None) -> CompressedLora:
        """What is to be saved, in memory; see `saving.compress_trained`."""
        return compress_trained(self, dtype, metadata)

    def close(self) -> None:
        """Let go of the layers and of the optimizers."""
        self._watch.close()
        self.attachment.detach()

    def begin(self) -> Timeline:
        """Fix when things happen. Called at the first step; earlier where total_steps is known."""
        total = self._total if isinstance(self._total, int) else int(self._total())
        self.timeline = Timeline.of_settings(self.settings.training, self.settings.quantized_training, total)
        device = next(iter(self.pairs.values())).weights[0].device
        if self.state.step.device != device:  # nobody has registered it where the network is moved
            self.state.to(device)
        self.attachment.follow()
        return self.timeline

    def before_step(self) -> None:
        """Before an optimizer step: gradients are final here."""
        if self.timeline is None:
            self.begin()
        if self._due is not None:
            self._adapt(self._due)
        if self.state.has("sensitivity") and self._step < self.last_pruning_step:
            for name, pair in self.pairs.items():
                self._observe(name, pair)
        self.attachment.hold_masked()

    def after_step(self, optimizers: Sequence[Optimizer]) -> None:
        """After an optimizer step: whatever is due."""
        timeline = self.timeline or self.begin()
        self.attachment.release_masked()
        if self.quantizing and not self.attachment.used:
            raise SettingsError(["qat=true: the network does not compute with the weights of its layers: remove qat"], "training")
        self._step += 1
        self.state.step.fill_(self._step)
        if self._step == timeline.rotation and not self.quantizing:
            rotate_pairs(self, optimizers)
        if self._step in timeline.pruning:
            prune_pairs(self, optimizers, timeline.above_goal(self._step))
        elif self.adaptable and self._step == self.last_pruning_step:  # what is masked by now goes for good
            mask_pairs(self, optimizers)
        if self._step == timeline.quantization:
            self._begin_quantization(optimizers)
        elif self.quantizing and timeline.refreshes(self._step):
            self.choose_grids()
        self.attachment.follow()

    @torch.no_grad()
    def _adapt(self, settings: CompressionSettings) -> None:
        self._due = None
        ranks = settings.pruning != self.settings.pruning
        self.use(settings)
        if ranks and self.may_return:
            prune_pairs(self, self._watch.optimizers, 0.0)
        if self.quantizing:
            self.choose_grids()
        self.attachment.follow()

    def _observe(self, name: str, pair: Pair) -> None:
        down, up = (weight.grad for weight in pair.weights)
        if down is None or up is None:
            return
        value = component_sensitivity(pair.live_rows(), (pair.rows(0, down), pair.rows(1, up)))
        update_sensitivity(self.state.part("sensitivity", name), value)

    @torch.no_grad()
    def _begin_quantization(self, optimizers: Sequence[Optimizer]) -> None:
        rotate_pairs(self, optimizers, weighted=False)
        for name, pair in self.pairs.items():  # dW has no more components than its smaller side: the others are unused by now
            kept = self.kept(name)
            kept[kept.nonzero().flatten()[min(pair.row_sizes) :]] = False
        mask_pairs(self, optimizers)
        self.state.quantizing.fill_(True)
        self._quantizing = True
        self.choose_grids()

    @torch.no_grad()
    def choose_grids(self) -> None:
        """Search the grid of every row anew."""
        assert self.grid is not None
        grid = self.grid
        rows = {name: pair.live_rows() for name, pair in self.pairs.items()}
        stored: Mapping[str, Sequence[Tensor]] = rows
        if self.may_return and self.any_masked:  # otherwise what is masked is zero already
            stored = {name: tuple(part * self.kept(name).unsqueeze(1) for part in parts) for name, parts in rows.items()}
        grid.prepare(stored, self.state.down_grid)  # type: ignore[arg-type]
        for name, found in each_module(lambda name, parts: grid.choose(parts), rows).items():
            for kind, parameters in zip(("down_grid", "up_grid"), found, strict=True):
                self.state.part(kind, name).copy_(parameters)
        take_from_first_rank(getattr(self.state, kind) for kind in ("down_grid", "up_grid"))
        grid.forget()

    def _loaded(self) -> None:
        self._step = int(self.state.step)
        self._quantizing = self.grid is not None and bool(self.state.quantizing)
        self.any_masked = self.state.has("kept") and not bool(self.state.kept.all())  # type: ignore[operator]
        if self.grid is not None:
            self.grid.forget()
        if self._step:  # resumed: the host knows by now how long it trains
            self.begin()
        self.attachment.follow()
