"""A training under compression: attached to pairs of layers by name, led by the steps of whatever optimizer holds their weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import SettingsError
from ..parallel import each_module
from ..pipeline import CompressedLora
from ..settings import CompressionSettings
from ..update import LowRankUpdate
from .across import average_over_ranks, take_from_first_rank
from .attach import Attachment
from .calibration import calibration_layout
from .fake import Grid, make_grid
from .importance import component_norms, component_sensitivity, rotate_averages, update_sensitivity
from .masks import choose_masks
from .optimizer_state import clear_state, rotate_state
from .pairs import Pair
from .rotation import Rotation, balanced_rotation
from .saving import compress_trained
from .schedule import Timeline
from .state import TrainingState
from .steps import OptimizerWatch

__all__ = ["TrainingSession"]

_LOGGER = logging.getLogger(__name__)


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
    """

    def __init__(self, pairs: Mapping[str, Pair], settings: CompressionSettings, total_steps: int | Callable[[], int]) -> None:
        if not pairs:
            raise SettingsError(["no pair of layers to train: nothing was found in the network"], "training")
        self.pairs, self.settings, self._total = dict(pairs), settings, total_steps
        self.grid: Grid | None = make_grid(settings.quantization) if settings.quantized_training.qat else None
        self.timeline: Timeline | None = None
        self.state = TrainingState(self._layout())
        self.state.on_load(self._loaded)
        self._step = 0  # of state.step, without asking a device
        self._any_masked = False
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
        return self.grid is not None and bool(self.state.quantizing)

    @property
    def any_masked(self) -> bool:
        """Whether a component has been masked."""
        return self._any_masked

    @property
    def last_pruning_step(self) -> int:
        """When ranks are final; before the first step nobody knows, and it is never."""
        if not self.settings.training.iterative_pruning:
            return 0
        return self.timeline.pruning[-1] if self.timeline else 1 << 62

    def kept(self, name: str) -> Tensor:
        """(r,) bool: the components of a pair that have not been masked."""
        if self.state.has("kept"):
            return self.state.part("kept", name)
        pair = self.pairs[name]
        return torch.ones(pair.rank, dtype=torch.bool, device=pair.weights[0].device)

    def effective_weight(self, name: str, side: int) -> Tensor:
        """The weight that a layer computes with: down's for side 0, up's for side 1; with the gradient of the live one."""
        return self.attachment.effective_weight(self.pairs[name], side)

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
        self.attachment.follow()
        return self.timeline

    def before_step(self) -> None:
        """Before an optimizer step: gradients are final here."""
        if self.timeline is None:
            self.begin()
        if self.state.has("sensitivity") and self._step < self.last_pruning_step:
            for name, pair in self.pairs.items():
                self._observe(name, pair)
        self.attachment.hold_masked()

    def after_step(self, optimizers: Sequence[Optimizer]) -> None:
        """After an optimizer step: whatever is due."""
        timeline = self.timeline or self.begin()
        self.attachment.release_masked()
        if self.quantizing and not self.attachment.called:
            raise SettingsError(
                ["qat=true: the network computes with the weights of its layers without calling them: remove qat"], "training"
            )
        self._step += 1
        self.state.step.fill_(self._step)
        if self._step == timeline.rotation and not self.quantizing:
            self._rotate(optimizers)
        if self._step in timeline.pruning:
            self._prune(optimizers, timeline.above_goal(self._step))
        if self._step == timeline.quantization:
            self._begin_quantization(optimizers)
        elif self.quantizing and timeline.refreshes(self._step):
            self._choose_grids()
        self.attachment.follow()

    def _observe(self, name: str, pair: Pair) -> None:
        down, up = (weight.grad for weight in pair.weights)
        if down is None or up is None:
            return
        value = component_sensitivity(pair.live_rows(), (pair.rows(0, down), pair.rows(1, up)))
        update_sensitivity(self.state.part("sensitivity", name), value)

    @torch.no_grad()
    def _rotate(self, optimizers: Sequence[Optimizer], weighted: bool = True) -> None:
        """Bring the kept components of every pair to their balanced form; `weighted`: by activations, where they are observed."""
        if weighted and self.state.has("gram"):
            average_over_ranks([self.state.gram])  # type: ignore[list-item]
        updates = {name: self._kept_update(name) for name in self.pairs if bool(self.kept(name).any())}
        rotations = each_module(
            lambda name, update: balanced_rotation(update, self._kept_gram(name) if weighted else None), updates
        )
        for name, rotation in rotations.items():
            self._turn(self.pairs[name], rotation, optimizers)
        take_from_first_rank(weight.data for pair in self.pairs.values() for weight in pair.weights)

    def _kept_update(self, name: str) -> LowRankUpdate:
        """The kept components on the CPU, their scale unchanged."""
        pair, kept = self.pairs[name], self.kept(name).cpu()
        down, up = (weight.detach().cpu() for weight in pair.weights)
        return LowRankUpdate(down[kept], up[:, kept], pair.scale * int(kept.sum()))

    def _kept_gram(self, name: str) -> Tensor | None:
        if not self.state.has("gram") or not int(self.state.part("gram_count", name)):
            return None
        kept = self.kept(name).cpu()
        return self.state.part("gram", name).cpu().double()[kept][:, kept]

    def _turn(self, pair: Pair, rotation: Rotation, optimizers: Sequence[Optimizer]) -> None:
        """Apply a rotation of the kept components to weights, gradients, optimizer state and averages."""
        kept = self.kept(pair.name).cpu()
        down_map, up_map = (_embed(part, kept) for part in (rotation.down_map, rotation.up_map))
        maps = (down_map, up_map), (up_map, down_map)  # of weights and of their gradients
        for side, weight in enumerate(pair.weights):
            for tensor, map_ in ((weight.data, maps[0][side]), (weight.grad, maps[1][side])):
                if tensor is not None:
                    pair.mix(side, tensor, map_)
            for optimizer in optimizers:
                rotate_state(optimizer, pair, side, maps[1][side])
        if self.state.has("sensitivity"):
            rotate_averages(self.state.part("sensitivity", pair.name), down_map, up_map)
        if self.state.has("gram"):
            gram = self.state.part("gram", pair.name)
            gram.copy_(down_map.to(gram.device) @ gram.double() @ down_map.T.to(gram.device))

    @torch.no_grad()
    def _prune(self, optimizers: Sequence[Optimizer], above_goal: float) -> None:
        if not self.quantizing:  # from then on the basis stays
            self._rotate(optimizers)
        scores = {name: self._scores(name) for name in self.pairs}
        kernels = {name: tuple(pair.weights[0].shape[2:]) for name, pair in self.pairs.items()}
        masks = choose_masks(scores, self.settings.pruning, above_goal, kernels)
        kept = self.state.kept
        before = int(kept.sum())  # type: ignore[operator, arg-type]
        for name, mask in masks.items():
            part = self.state.part("kept", name)
            new = mask.to(part.device)
            part.copy_(new if self.settings.training.rank_return else part & new)
        self._mask(optimizers)
        _LOGGER.info("step %d: %d of %d components kept, %d before", self._step, int(kept.sum()), kept.numel(), before)  # type: ignore

    def _scores(self, name: str) -> Tensor:
        """What each component of a pair is worth, (r,) float64 on the CPU; 0 for those that are gone for good."""
        pair, kept = self.pairs[name], self.kept(name).cpu()
        rows = [part.cpu() for part in pair.live_rows()]
        if self.state.has("sensitivity"):
            scores = self.state.part("sensitivity", name).double().prod(dim=0).cpu()
        elif self.state.has("gram") and int(self.state.part("gram_count", name)):
            reach = self.state.part("gram", name).diagonal().double().clamp_min(0.0).sqrt().cpu()
            scores = reach * rows[1].double().norm(dim=1) * abs(pair.scale)
        else:
            scores = component_norms(rows[0], rows[1], pair.scale)
        return scores if self.settings.training.rank_return else scores * kept

    def _mask(self, optimizers: Sequence[Optimizer]) -> None:
        """Let optimizers forget masked components; their weights become zero, unless they may return."""
        take_from_first_rank([self.state.kept])  # type: ignore[list-item]
        self._any_masked = not bool(self.state.kept.all())  # type: ignore[operator]
        for name, pair in self.pairs.items():
            masked = ~self.kept(name)
            if not bool(masked.any()):
                continue
            for side, weight in enumerate(pair.weights):
                for tensor in (weight.data, weight.grad) if not self.settings.training.rank_return else ():
                    if tensor is not None:
                        pair.fill(side, tensor, masked, 0.0)
                for optimizer in optimizers:
                    clear_state(optimizer, pair, side, masked)

    @torch.no_grad()
    def _begin_quantization(self, optimizers: Sequence[Optimizer]) -> None:
        self._rotate(optimizers, weighted=False)
        for name, pair in self.pairs.items():  # dW has no more components than its smaller side: the others are unused by now
            kept = self.kept(name)
            kept[kept.nonzero().flatten()[min(pair.row_sizes) :]] = False
        self._mask(optimizers)
        self.state.quantizing.fill_(True)
        self._choose_grids()

    @torch.no_grad()
    def _choose_grids(self) -> None:
        """Search the grid of every row anew."""
        assert self.grid is not None
        grid = self.grid
        rows = {name: pair.live_rows() for name, pair in self.pairs.items()}
        grid.prepare(rows, self.state.down_grid)  # type: ignore[arg-type]
        for name, found in each_module(lambda name, parts: grid.choose(parts), rows).items():
            for kind, parameters in zip(("down_grid", "up_grid"), found, strict=True):
                self.state.part(kind, name).copy_(parameters)
        take_from_first_rank(getattr(self.state, kind) for kind in ("down_grid", "up_grid"))
        grid.forget()

    def _loaded(self) -> None:
        self._step = int(self.state.step)
        self._any_masked = self.state.has("kept") and not bool(self.state.kept.all())  # type: ignore[operator]
        if self.grid is not None:
            self.grid.forget()
        if self._step:  # resumed: the host knows by now how long it trains
            self.begin()
        self.attachment.follow()

    def _layout(self) -> dict[str, Any]:
        training, ranks = self.settings.training, {name: pair.rank for name, pair in self.pairs.items()}
        layout: dict[str, Any] = {}
        if training.iterative_pruning or self.grid is not None:
            layout["kept"] = torch.bool, {name: (rank,) for name, rank in ranks.items()}
        if training.iterative_pruning:
            if training.importance == "sensitivity":
                layout["sensitivity"] = torch.float32, {name: (2, rank) for name, rank in ranks.items()}
            if training.importance == "activation":
                layout["gram"] = torch.float32, {name: (rank, rank) for name, rank in ranks.items()}
                layout["gram_count"] = torch.float32, dict.fromkeys(ranks, (1,))
        if training.collect_calibration:
            layout |= calibration_layout(self.pairs)
        if self.grid is not None:
            for side, kind in enumerate(("down_grid", "up_grid")):
                sizes = {name: self.grid.width(pair.row_sizes[side]) for name, pair in self.pairs.items()}
                layout[kind] = torch.float32, {name: (ranks[name], size) for name, size in sizes.items()}
        return layout


def _embed(map_: Tensor, kept: Tensor) -> Tensor:
    """A map of the kept components as one of all: the others stay."""
    whole = torch.eye(len(kept), dtype=torch.float64)
    places = kept.nonzero().flatten()
    whole[places.unsqueeze(1), places] = map_
    return whole
