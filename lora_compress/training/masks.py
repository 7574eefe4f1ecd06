"""Which components of the whole network stay at a pruning step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..pruning import consumer_minimum, select_ranks
from ..settings import PruningSettings

__all__ = ["choose_masks"]


def choose_masks(
    scores: Mapping[str, Tensor],
    settings: PruningSettings,
    above_goal: float,
    kernels: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """Components that stay, (r,) bool by module, on the way from all N to the N* that `settings` leave.

    What `select_ranks` would keep at the end always stays; of the others the best, up to N* + (N - N*) above_goal in all. So every
    criterion that works on finished files has its way in the same manner.

    Args:
        scores: (r,) by module, in any order; 0 for components that are gone.
        settings: the criteria; channels are not looked at.
        above_goal: from 1, where all stay, to 0, where the goal is reached; see `schedule`.
        kernels: kernel size per module, for new_conv_rank.
    """
    names = list(scores)
    values = {name: scores[name].detach().double().cpu() for name in names}
    orders = {name: torch.argsort(value, descending=True, stable=True) for name, value in values.items()}
    protected = consumer_minimum({name: float(value.square().sum()) for name, value in values.items()})
    ranks = select_ranks({name: values[name][orders[name]] for name in names}, settings, kernels, protected)
    masks = {name: torch.zeros(len(value), dtype=torch.bool) for name, value in values.items()}
    for name, mask in masks.items():
        mask[orders[name][: ranks[name]]] = True
    goal, total = sum(ranks.values()), sum(map(len, values.values()))
    extra = int((total - goal) * above_goal + 1e-9)
    if extra:
        rest = torch.cat([values[name].masked_fill(masks[name], -1.0) for name in names])
        flat = torch.cat([masks[name] for name in names])
        flat[torch.argsort(rest, descending=True, stable=True)[:extra]] = True
        masks = dict(zip(names, flat.split([len(values[name]) for name in names]), strict=True))
    return masks
