"""Which components survive: pure functions from spectra to ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .settings import PruningSettings

__all__ = ["select_ranks"]


def select_ranks(sigmas: Mapping[str, Tensor], settings: PruningSettings) -> dict[str, int]:
    """Number of components each module keeps; 0 drops the module. Strongest first, so a rank describes the kept set.

    With sigma_mi the effective singular values (alpha / r included) of module m and N their number in all:

    1. norm_threshold t: module m goes if ||dW_m||_F = sqrt(sum_i sigma_mi^2) < t; in the others, components with
       sigma_mi < t go.
    2. rank_ratio q: of the survivors the max(1, floor(q N)) strongest of the whole file stay.
    3. min_rank k: every module that step 1 left keeps its k strongest components (or all it has), whatever steps 1
       and 2 said of them. The share kept can therefore exceed q.

    Args:
        sigmas: effective singular values per module, each (k,), falling.
    """
    norms = {name: float(sigma.double().norm()) for name, sigma in sigmas.items()}
    staying = {name: sigma for name, sigma in sigmas.items() if norms[name] >= settings.norm_threshold}
    ranks = {name: int((sigma >= settings.norm_threshold).sum()) for name, sigma in staying.items()}

    total = sum(len(sigma) for sigma in sigmas.values())
    budget = max(1, int(settings.rank_ratio * total + 1e-9)) if total else 0
    if sum(ranks.values()) > budget:
        ranks = _strongest({name: sigma[: ranks[name]] for name, sigma in staying.items()}, budget)

    floors = {name: min(settings.min_rank, len(sigma)) for name, sigma in staying.items()}
    return {name: max(ranks[name], floors[name]) if name in staying else 0 for name in sigmas}


def _strongest(sigmas: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks of the `budget` strongest components over all modules; a stable order settles ties."""
    names = list(sigmas)
    owner = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(sigmas[name]) for name in names]))
    values = torch.cat([sigmas[name].double().cpu() for name in names])
    kept = owner[torch.argsort(values, descending=True, stable=True)[:budget]]
    counts = torch.bincount(kept, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))
