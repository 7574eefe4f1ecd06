"""How many components each module of a file keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..settings import PruningSettings
from .dynamic import dynamic_rank
from .layers import drop_layers

__all__ = ["select_ranks"]


def select_ranks(
    scores: Mapping[str, Tensor],
    settings: PruningSettings,
    kernels: Mapping[str, tuple[int, ...]] | None = None,
    protected: Collection[str] = (),
) -> dict[str, int]:
    """Number of components each module keeps; 0 drops the module. Strongest first, so a rank describes the kept set.

    With s_mi the scores of module m (effective singular values, alpha / r included, or those weighted) and N their number in all:

    1. layer_threshold: module m goes if sum_i s_mi^2 is below that share of the file's sum.
    2. norm_threshold t: module m goes if sqrt(sum_i s_mi^2) < t; in the others, components with s_mi < t go.
    3. new_rank, new_conv_rank and dynamic_method: a module keeps at most so many; `dynamic_rank` says how many the method wants.
    4. rank_ratio q: of the survivors the max(1, floor(q N)) strongest of the whole file stay.
    5. min_rank k (`PruningSettings.rank_floor`): every module that steps 1 and 2 left keeps its k strongest components (or all
       that its cap allows), whatever steps 2 to 4 said of them. The share kept can therefore exceed q.

    Args:
        scores: per module, each (k,), falling.
        settings: which of the steps apply.
        kernels: kernel size per module, for new_conv_rank; () where a name is absent.
        protected: modules that keep their strongest component, whatever the steps say of them; see `consumer_minimum`.
    """
    staying = _staying(scores, settings)
    caps = {name: _cap(score, settings.rank_cap((kernels or {}).get(name, ()))) for name, score in scores.items()}
    ranks = {name: min(_own_rank(scores[name], settings), caps[name]) for name in staying}
    total = sum(len(score) for score in scores.values())
    budget = max(1, int(settings.rank_ratio * total + 1e-9)) if total else 0
    if sum(ranks.values()) > budget:
        ranks = _strongest({name: scores[name][: ranks[name]] for name in staying}, budget)

    chosen = {name: min(max(ranks[name], settings.rank_floor), caps[name]) if name in ranks else 0 for name in scores}
    return {name: max(rank, min(1, len(scores[name]))) if name in protected else rank for name, rank in chosen.items()}


def _staying(scores: Mapping[str, Tensor], settings: PruningSettings) -> list[str]:
    """Steps 1 and 2."""
    if not (settings.layer_threshold or settings.norm_threshold):
        return list(scores)
    norms = {name: float(score.double().norm()) for name, score in scores.items()}
    dropped = drop_layers({name: norm**2 for name, norm in norms.items()}, settings.layer_threshold)
    return [name for name in scores if name not in dropped and norms[name] >= settings.norm_threshold]


def _own_rank(score: Tensor, settings: PruningSettings) -> int:
    above = int((score >= settings.norm_threshold).sum()) if settings.norm_threshold else len(score)
    if settings.dynamic_method is None:
        return above
    return min(above, dynamic_rank(score.cpu(), settings.dynamic_method, settings.dynamic_param))


def _cap(score: Tensor, cap: int | None) -> int:
    return len(score) if cap is None else min(cap, len(score))


def _strongest(scores: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks of the `budget` strongest components over all modules; a stable order settles ties."""
    names = list(scores)
    owner = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(scores[name]) for name in names]))
    values = torch.cat([scores[name].double().cpu() for name in names])
    kept = owner[torch.argsort(values, descending=True, stable=True)[:budget]]
    counts = torch.bincount(kept, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))
