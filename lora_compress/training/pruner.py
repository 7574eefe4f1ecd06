"""A pruning step of a session: rotate the pairs, score the components of the whole network, mask the weakest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..parallel import each_module
from ..update import LowRankUpdate
from .across import average_over_ranks, take_from_first_rank
from .importance import component_norms, rotate_averages
from .masks import choose_masks
from .optimizer_state import clear_state, rotate_state
from .pairs import Pair
from .rotation import Rotation, balanced_rotation

if TYPE_CHECKING:
    from .session import TrainingSession

__all__ = ["mask_pairs", "prune_pairs", "rotate_pairs"]

_LOGGER = logging.getLogger(__name__)


@torch.no_grad()
def rotate_pairs(session: TrainingSession, optimizers: Sequence[Optimizer], weighted: bool = True) -> None:
    """Bring the kept components of every pair to their balanced form; `weighted`: by activations, where they are observed."""
    if weighted and session.state.has("gram"):
        average_over_ranks([session.state.gram])  # type: ignore[list-item]
    updates = {name: _kept_update(session, name) for name in session.pairs if bool(session.kept(name).any())}
    rotations = each_module(
        lambda name, update: balanced_rotation(update, _kept_gram(session, name) if weighted else None), updates
    )
    for name, rotation in rotations.items():
        _turn(session, session.pairs[name], rotation, optimizers)
    take_from_first_rank(weight.data for pair in session.pairs.values() for weight in pair.weights)


def _kept_update(session: TrainingSession, name: str) -> LowRankUpdate:
    """The kept components on the CPU, their scale unchanged."""
    pair, kept = session.pairs[name], session.kept(name).cpu()
    down, up = (weight.detach().cpu() for weight in pair.weights)
    return LowRankUpdate(down[kept], up[:, kept], pair.scale * int(kept.sum()))


def _kept_gram(session: TrainingSession, name: str) -> Tensor | None:
    if not session.state.has("gram") or not int(session.state.part("gram_count", name)):
        return None
    kept = session.kept(name).cpu()
    return session.state.part("gram", name).cpu().double()[kept][:, kept]


def _turn(session: TrainingSession, pair: Pair, rotation: Rotation, optimizers: Sequence[Optimizer]) -> None:
    """Apply a rotation of the kept components to weights, gradients, optimizer state and averages."""
    kept = session.kept(pair.name).cpu()
    down_map, up_map = (_embed(part, kept) for part in (rotation.down_map, rotation.up_map))
    maps = (down_map, up_map), (up_map, down_map)  # of weights and of their gradients
    for side, weight in enumerate(pair.weights):
        for tensor, map_ in ((weight.data, maps[0][side]), (weight.grad, maps[1][side])):
            if tensor is not None:
                pair.mix(side, tensor, map_)
        for optimizer in optimizers:
            rotate_state(optimizer, pair, side, maps[1][side])
    if session.state.has("sensitivity"):
        rotate_averages(session.state.part("sensitivity", pair.name), down_map, up_map)
    if session.state.has("gram"):
        gram = session.state.part("gram", pair.name)
        gram.copy_(down_map.to(gram.device) @ gram.double() @ down_map.T.to(gram.device))


@torch.no_grad()
def prune_pairs(session: TrainingSession, optimizers: Sequence[Optimizer], above_goal: float) -> None:
    """Mask what the schedule says is above the budget; `above_goal` as in `choose_masks`."""
    if not session.quantizing:  # from then on the basis stays
        rotate_pairs(session, optimizers)
    scores = {name: _scores(session, name) for name in session.pairs}
    kernels = {name: tuple(pair.weights[0].shape[2:]) for name, pair in session.pairs.items()}
    masks = choose_masks(scores, session.settings.pruning, above_goal, kernels)
    kept = session.state.kept
    before = int(kept.sum())  # type: ignore[operator, arg-type]
    for name, mask in masks.items():
        part = session.state.part("kept", name)
        new = mask.to(part.device)
        part.copy_(new if session.may_return else part & new)
    mask_pairs(session, optimizers)
    _LOGGER.info("step %d: %d of %d components kept, %d before", session.step, int(kept.sum()), kept.numel(), before)  # type: ignore


def _scores(session: TrainingSession, name: str) -> Tensor:
    """What each component of a pair is worth, (r,) float64 on the CPU; 0 for those that are gone for good."""
    pair, kept = session.pairs[name], session.kept(name).cpu()
    rows = [part.cpu() for part in pair.live_rows()]
    if session.state.has("sensitivity"):
        scores = session.state.part("sensitivity", name).double().prod(dim=0).cpu()
    elif session.state.has("gram") and int(session.state.part("gram_count", name)):
        reach = session.state.part("gram", name).diagonal().double().clamp_min(0.0).sqrt().cpu()
        scores = reach * rows[1].double().norm(dim=1) * abs(pair.scale)
    else:
        scores = component_norms(rows[0], rows[1], pair.scale)
    return scores if session.may_return else scores * kept


def mask_pairs(session: TrainingSession, optimizers: Sequence[Optimizer]) -> None:
    """Let optimizers forget masked components; their weights become zero, unless they may return. Masks are those of rank 0."""
    take_from_first_rank([session.state.kept])  # type: ignore[list-item]
    session.any_masked = not bool(session.state.kept.all())  # type: ignore[operator]
    for name, pair in session.pairs.items():
        masked = ~session.kept(name)
        if not bool(masked.any()):
            continue
        for side, weight in enumerate(pair.weights):
            for tensor in (weight.data, weight.grad) if not session.may_return else ():
                if tensor is not None:
                    pair.fill(side, tensor, masked, 0.0)
            for optimizer in optimizers:
                clear_state(optimizer, pair, side, masked)


def _embed(map_: Tensor, kept: Tensor) -> Tensor:
    """A map of the kept components as one of all: the others stay."""
    whole = torch.eye(len(kept), dtype=torch.float64)
    places = kept.nonzero().flatten()
    whole[places.unsqueeze(1), places] = map_
    return whole
