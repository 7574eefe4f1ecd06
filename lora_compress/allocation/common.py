"""One rank for all modules of a part of the model, for a size or an error: what programs need that mis-scale ranks that differ.

A component of the part's rank R costs the width of all modules that are kept, whether they have so many components or not. So a
part is one ladder, and climbing all parts' ladders is reverse water-filling over them. From there single modules are left out and
ranks moved by one, together or apart, as long as that is better: the steps of a part are large, a module is a fine one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping

import numpy as np
from torch import Tensor

from ..errors import SettingsError
from .ladders import Ladder, climb_to_error, climb_to_size
from .ranks import groups_of, squared_norms

__all__ = ["common_ranks_for_error", "common_ranks_for_size"]

Ranks = dict[str, int]


def common_ranks_for_size(
    sigmas: Mapping[str, Tensor],
    bytes_per_component: Mapping[str, int],
    fixed_bytes: Mapping[str, int],
    budget: int,
    *,
    parts: Mapping[str, str],
    weights: Mapping[str, float] | None = None,
    protected: Collection[str] = (),
    min_rank: int = 0,
    min_rank_stored: int = 1,
) -> Ranks:
    """Ranks as `ranks_for_size` gives them, where a module of rank k > 0 takes as much as the largest rank in its part.

    Raises:
        SettingsError: min_rank and the protected modules alone exceed the budget.
    """
    model = _Parts(sigmas, bytes_per_component, fixed_bytes, parts, weights, protected, min_rank, min_rank_stored)

    def keep(ranks: Ranks) -> tuple[float, Ranks]:
        ladders = model.modules(ranks)
        taken = climb_to_size(ladders, budget)
        return sum(ladder.lost(taken[name]) for name, ladder in ladders.items()), model.ranks(ranks, taken)

    return model.search(lambda: climb_to_size(model.ladders(), budget), keep)


def common_ranks_for_error(
    sigmas: Mapping[str, Tensor],
    bytes_per_component: Mapping[str, int],
    fixed_bytes: Mapping[str, int],
    error: float | None,
    *,
    parts: Mapping[str, str],
    part_errors: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    protected: Collection[str] = (),
    min_rank: int = 0,
    min_rank_stored: int = 1,
) -> Ranks:
    """Ranks as `ranks_for_error` gives them, where a module of rank k > 0 takes as much as the largest rank in its part.

    Raises:
        SettingsError: the target is below what is lost with every component kept.
    """
    model = _Parts(sigmas, bytes_per_component, fixed_bytes, parts, weights, protected, min_rank, min_rank_stored)
    norms = squared_norms(sigmas, weights)
    errors, groups = groups_of(list(sigmas), error, part_errors, parts)

    def keep(ranks: Ranks) -> tuple[float, Ranks]:
        ladders = model.modules(ranks)
        taken = climb_to_error(ladders, norms, errors, groups)
        return sum(ladder.bytes(taken[name]) for name, ladder in ladders.items()), model.ranks(ranks, taken)

    def start() -> Ranks:
        of_parts = {part: sum(norms[name] for name in names) for part, names in model.names.items()}
        return climb_to_error(
            model.ladders(), of_parts, errors, {g: list({parts[n]: 0 for n in names}) for g, names in groups.items()}
        )

    return model.search(start, keep)


class _Parts:
    """Modules by part, and the ladders that they make."""

    def __init__(
        self,
        sigmas: Mapping[str, Tensor],
        bytes_per_component: Mapping[str, int],
        fixed_bytes: Mapping[str, int],
        parts: Mapping[str, str],
        weights: Mapping[str, float] | None,
        protected: Collection[str],
        min_rank: int,
        min_rank_stored: int,
    ) -> None:
        self._costs, self._fixed, self._parts, self._protected = bytes_per_component, fixed_bytes, parts, protected
        self._floor, self._stored = min_rank, min_rank_stored
        self._squares = {
            name: (weights or {}).get(name, 1.0) * sigma.double().square().cpu().numpy() for name, sigma in sigmas.items()
        }
        self.names: dict[str, list[str]] = {}
        for name, squares in self._squares.items():
            if len(squares):
                self.names.setdefault(parts[name], []).append(name)
        self._most = {part: max(len(self._squares[name]) for name in names) for part, names in self.names.items()}

    def ladders(self) -> dict[str, Ladder]:
        """Of the parts: an item for each component of all their modules."""
        result = {}
        for part, names in self.names.items():
            gains = np.zeros(self._most[part])
            for name in names:
                gains[: len(self._squares[name])] += self._squares[name]
            width = sum(self._costs[name] for name in names)
            costs = np.full(len(gains), width, dtype=np.int64)
            costs[: self._stored] = 0  # paid with the first component
            fixed = sum(self._fixed[name] for name in names) + self._stored * width
            result[part] = Ladder(costs, gains, fixed, min(self._floor, len(gains)))
        return result

    def modules(self, ranks: Ranks) -> dict[str, Ladder]:
        """Of the modules at their parts' ranks: one item, the whole module."""
        result = {}
        for name, squares in self._squares.items():
            rank = ranks.get(self._parts[name], 0)
            kept, floor = float(squares[:rank].sum()), int(len(squares) > 0 and (self._floor > 0 or name in self._protected))
            cost = np.array([max(rank, self._stored) * self._costs[name]], dtype=np.int64)
            result[name] = Ladder(cost, np.array([kept]), self._fixed[name], floor, float(squares[rank:].sum()))
        return result

    def ranks(self, ranks: Ranks, taken: Mapping[str, int]) -> Ranks:
        """Components of each module."""
        return {
            n: min(ranks[self._parts[n]], len(squares)) if taken[n] and len(squares) else 0 for n, squares in self._squares.items()
        }

    def search(self, start: Callable[[], Ranks], keep: Callable[[Ranks], tuple[float, Ranks]]) -> Ranks:
        """The modules' ranks of least cost as `keep` tells it, from the parts' ranks of `start` on."""
        least = {part: min(max(self._floor, 1), most) for part, most in self._most.items()}
        try:
            here = {part: max(rank, least[part]) for part, rank in start().items()}
            cost, found = keep(here)
        except SettingsError:  # whole parts are too much for the budget
            here = least
            cost, found = keep(here)
        tried = {tuple(here.values())}
        moves = sorted(itertools.product((-1, 0, 1), repeat=len(here)), key=np.count_nonzero)
        while True:
            for move in moves:
                there = {p: min(max(r + m, least[p]), self._most[p]) for (p, r), m in zip(here.items(), move, strict=True)}
                if tuple(there.values()) in tried:
                    continue
                tried.add(tuple(there.values()))
                try:
                    reached, modules = keep(there)
                except SettingsError:
                    continue
                if reached < cost:
                    here, cost, found = there, reached, modules
                    break
            else:
                return found
