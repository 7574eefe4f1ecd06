"""Ranks for a size or for an error, where every component of a module costs the same bytes: plain and fixed-width files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .ladders import Ladder, climb_to_error, climb_to_size

__all__ = ["groups_of", "ranks_for_error", "ranks_for_size", "squared_norms", "truncation_points"]


def ranks_for_size(
    sigmas: Mapping[str, Tensor],
    bytes_per_component: Mapping[str, int],
    fixed_bytes: Mapping[str, int],
    budget: int,
    *,
    weights: Mapping[str, float] | None = None,
    protected: Collection[str] = (),
    min_rank: int = 0,
    min_rank_stored: int = 1,
) -> dict[str, int]:
    """Ranks that keep the most of sum_m w_m sum_i sigma_mi^2 in at most `budget` bytes; 0 drops a module.

    A module of rank k > 0 takes fixed_bytes + max(k, min_rank_stored) * bytes_per_component bytes. The sum over the modules never
    exceeds the budget, and what is left is less than the cheapest component that could still be added.

    Args:
        sigmas: effective singular values (or scores) per module, each (k,), falling; cut them to cap the ranks.
        bytes_per_component: bytes of one component, both factors.
        fixed_bytes: bytes of having the module at all (keys, alpha, header entries).
        budget: bytes for all modules; the file's own header is the caller's to take off.
        weights: w_m, 1 where absent.
        protected: modules that keep a component in any case.
        min_rank: components that every module keeps at least, or all it has.
        min_rank_stored: rank to which a smaller one is padded in the file; the padding is paid.

    Raises:
        SettingsError: min_rank and the protected modules alone exceed the budget.
    """
    ladders = _ladders(sigmas, bytes_per_component, fixed_bytes, weights, protected, min_rank, min_rank_stored, 0.0)
    return climb_to_size(ladders, budget)


def ranks_for_error(
    sigmas: Mapping[str, Tensor],
    bytes_per_component: Mapping[str, int],
    fixed_bytes: Mapping[str, int],
    error: float | None,
    *,
    part_errors: Mapping[str, float] | None = None,
    parts: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    protected: Collection[str] = (),
    min_rank: int = 0,
    min_rank_stored: int = 1,
    distortion: float = 0.0,
) -> dict[str, int]:
    """Ranks that take the fewest bytes with a relative error of at most `error`, over the file and over each part that has one.

    The squared error is sum_m w_m (sum_{i>k} sigma_mi^2 + (2 d + d^2) sum_{i<=k} sigma_mi^2), relative to sum_mi w_m sigma_mi^2;
    d is the relative squared error of a stored factor. It never exceeds the target, and no module's last component can go
    without exceeding it.

    Args:
        error: of the whole file; None where only parts have one.
        part_errors: by part.
        parts: part of each module; needed with part_errors.
        distortion: d above: 0 for exact storage, about 7e-4 for fp8 (e4m3).
        others: as in `ranks_for_size`.

    Raises:
        SettingsError: the target is below what storage costs with every component kept.
    """
    ladders = _ladders(sigmas, bytes_per_component, fixed_bytes, weights, protected, min_rank, min_rank_stored, distortion)
    errors, groups = groups_of(list(sigmas), error, part_errors, parts)
    return climb_to_error(ladders, squared_norms(sigmas, weights), errors, groups)


def truncation_points(
    sigmas: Sequence[Tensor], bytes_per_component: Sequence[int], errors: Sequence[float], *, min_rank: int = 0
) -> list[tuple[int, float]]:
    """(bytes, relative error) of the files that truncation comes to on its way to each of `errors`, one sort for all of them.

    Components are taken in order of sigma^2 per byte until no more than an error is lost: at the sizes that it passes through no
    other choice is better, and the size that is needed is missed by less than a component.

    Args:
        sigmas: effective singular values (or scores) of each module, each (k,), falling.
        bytes_per_component: of each module.
        errors: relative, in (0, 1).
        min_rank: components that every module keeps, or all it has.
    """
    squares = torch.cat([torch.zeros(0), *sigmas]).double().square().cpu().numpy()
    counts = [len(sigma) for sigma in sigmas]
    costs = np.repeat(np.asarray(bytes_per_component, dtype=np.int64), counts)
    free = np.concatenate([np.zeros(0, dtype=np.int64), *map(np.arange, counts)]) >= min_rank
    total = float(squares.sum())
    if not total > 0.0:
        return []
    order = np.lexsort((-squares / costs, free))
    bytes_taken = np.concatenate([[0], np.cumsum(costs[order])])
    lost = np.concatenate([np.cumsum(squares[order][::-1])[::-1], [0.0]])  # with the first i taken
    least = int((~free).sum())
    taken = (max(int(np.argmax(lost <= error**2 * total)), least) for error in errors)
    return [(int(bytes_taken[count]), float((lost[count] / total) ** 0.5)) for count in taken]


def groups_of(
    names: Sequence[str], error: float | None, part_errors: Mapping[str, float] | None, parts: Mapping[str, str] | None
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Errors and module names by group: the parts that have a target of their own, then the whole file."""
    errors = {f"target_error of the {part}": value for part, value in (part_errors or {}).items()}
    groups = {f"target_error of the {part}": [name for name in names if (parts or {})[name] == part] for part in part_errors or {}}
    if error is not None:
        errors["target_error"], groups["target_error"] = error, list(names)
    return errors, groups


def squared_norms(sigmas: Mapping[str, Tensor], weights: Mapping[str, float] | None) -> dict[str, float]:
    """w_m sum_i sigma_mi^2 by module."""
    return {name: (weights or {}).get(name, 1.0) * float(sigma.double().square().sum()) for name, sigma in sigmas.items()}


def _ladders(
    sigmas: Mapping[str, Tensor],
    bytes_per_component: Mapping[str, int],
    fixed_bytes: Mapping[str, int],
    weights: Mapping[str, float] | None,
    protected: Collection[str],
    min_rank: int,
    min_rank_stored: int,
    distortion: float,
) -> dict[str, Ladder]:
    spoiled = 2 * distortion + distortion**2
    ladders = {}
    for name, sigma in sigmas.items():
        squares = (weights or {}).get(name, 1.0) * sigma.double().square().cpu().numpy()
        costs = np.full(len(squares), bytes_per_component[name], dtype=np.int64)
        costs[:min_rank_stored] = 0  # paid with the first component
        fixed = fixed_bytes[name] + min_rank_stored * bytes_per_component[name]
        floor = min(max(min_rank, int(name in protected)), len(squares))
        ladders[name] = Ladder(costs, squares * (1.0 - spoiled), fixed, floor, spoiled * float(squares.sum()))
    return ladders
