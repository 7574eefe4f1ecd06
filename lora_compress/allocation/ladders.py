"""Greedy choice along ladders: what ranks and bits have in common, free of both.

A module is a ladder of items, each with a cost in bytes and a gain in squared norm; to take an item, all before it are taken.
The first item of a module also costs `fixed`. Gains per byte fall along a ladder, so its lower convex hull is known at once: a
head (the first items, as many as give the most gain per byte with `fixed` paid) and then item by item. Taking hull steps of all
modules in order of gain per byte is optimal at every size that the order passes through (Everett 1963,
https://doi.org/10.1287/opre.11.3.399); between two such sizes less than one step is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingsError

__all__ = ["Ladder", "climb_to_error", "climb_to_size"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_ROUNDING = 1e-12  # of the norm: what float64 sums may be off by is never taken as allowed error


@dataclass(frozen=True)
class Ladder:
    """The items of one module.

    Args:
        costs: (n,), bytes of each item.
        gains: (n,), squared norm that each item keeps, >= 0.
        fixed: bytes of having the module at all.
        floor: items that are taken in any case.
        rest: squared norm that is lost even with all items taken (of quantization).
    """

    costs: Integers
    gains: Floats
    fixed: int = 0
    floor: int = 0
    rest: float = 0.0

    def bytes(self, count: int) -> int:
        """Cost of the first `count` items."""
        return self.fixed + int(self.costs[:count].sum()) if count else 0

    def lost(self, count: int) -> float:
        """Squared norm that is lost with the first `count` items taken."""
        return float(self.gains[count:].sum()) + self.rest


@dataclass(frozen=True)
class _Steps:
    """Hull steps of all ladders, best gain per byte first."""

    owner: Integers
    count: Integers  # items that a step takes
    cost: Integers
    gain: Floats


def climb_to_size(ladders: Mapping[str, Ladder], budget: int) -> dict[str, int]:
    """Items taken of each ladder: the most gain for at most `budget` bytes.

    Steps are taken best first; those that no longer fit are passed over, and a head that does not fit whole is taken in part, so
    that at the end nothing worth having fits into what is left.

    Raises:
        SettingsError: the floors alone exceed the budget.
    """
    taken = {name: ladder.floor for name, ladder in ladders.items()}
    left = budget - sum(ladder.bytes(taken[name]) for name, ladder in ladders.items())
    if left < 0:
        raise SettingsError(
            [f"target_size: {budget} bytes are too few, the least that this format can do is {budget - left} bytes"]
        )
    names, steps = list(ladders), _hull(ladders)
    start = int(np.searchsorted(np.cumsum(steps.cost), left, side="right"))
    for name, count in zip(names, np.bincount(steps.owner[:start], steps.count[:start], len(names)), strict=True):
        taken[name] += int(count)
    left -= int(steps.cost[:start].sum())
    waiting: dict[int, deque[int]] = {}  # by owner; only the first of each can be taken
    for index, owner in enumerate(steps.owner[start:].tolist(), start):
        waiting.setdefault(owner, deque()).append(index)
    first = [queue.popleft() for queue in waiting.values()]
    heapify(first)
    passed: list[int] = []
    while first:
        index = heappop(first)
        owner, cost = int(steps.owner[index]), int(steps.cost[index])
        if cost > left:
            passed.append(index)
            continue
        taken[names[owner]] += int(steps.count[index])
        left -= cost
        if waiting[owner]:
            heappush(first, waiting[owner].popleft())
    for index in passed:
        name = names[int(steps.owner[index])]
        if taken[name] == 0:
            taken[name], left = _part_of_head(ladders[name], left)
    return taken


def climb_to_error(
    ladders: Mapping[str, Ladder], norms: Mapping[str, float], errors: Mapping[str, float], groups: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """Items taken of each ladder: the fewest bytes with at most errors[g]^2 of the squared norm of every group lost.

    The parts are served first, each best step first, then the whole file from where they stand: as the groups are nested, that is
    the order of one Lagrangian. Then what turned out not to be needed is taken back, worst gain per byte first, as long as every
    group stays within its error. Modules in no group keep everything.

    Args:
        norms: squared norm by module.
        errors: relative error by group.
        groups: module names by group; parts of the model that do not overlap, or the whole file, which comes last.

    Raises:
        SettingsError: even with everything taken a group loses more.
    """
    limited = {name for group in errors for name in groups[group]}
    taken = {name: ladder.floor if name in limited else len(ladder.gains) for name, ladder in ladders.items()}
    names, steps = list(ladders), _hull(ladders)
    allowed = {group: errors[group] ** 2 * sum(norms[name] for name in groups[group]) for group in errors}
    allowed = {group: value * (1.0 - _ROUNDING) for group, value in allowed.items()}
    done = np.zeros(len(steps.owner), dtype=bool)
    for group in errors:
        least = sum(ladders[name].rest for name in groups[group])
        if least > allowed[group]:
            reached = (least / sum(norms[name] for name in groups[group])) ** 0.5
            raise SettingsError(
                [f"{group}={errors[group]:g} cannot be met: with every component kept this format reaches {reached:.4g}"]
            )
        members = set(groups[group])
        inside = np.isin(steps.owner, [index for index, name in enumerate(names) if name in members])
        open_steps = np.flatnonzero(inside & ~done)
        tails = np.concatenate([np.cumsum(steps.gain[open_steps][::-1])[::-1], [0.0]])  # lost with the first i of them taken
        chosen = open_steps[: int(np.argmax(tails + least <= allowed[group]))]
        done[chosen] = True
        for name, count in zip(names, np.bincount(steps.owner[chosen], steps.count[chosen], len(names)), strict=True):
            taken[name] += int(count)
    _take_back(ladders, taken, _Slack(ladders, taken, allowed, groups))
    return taken


class _Slack:
    """How much more each group may lose."""

    def __init__(
        self,
        ladders: Mapping[str, Ladder],
        taken: Mapping[str, int],
        allowed: Mapping[str, float],
        groups: Mapping[str, Sequence[str]],
    ) -> None:
        self._left = {group: allowed[group] - sum(ladders[n].lost(taken[n]) for n in groups[group]) for group in allowed}
        self._of: dict[str, list[str]] = {}
        for group in allowed:
            for name in groups[group]:
                self._of.setdefault(name, []).append(group)

    def of(self, name: str) -> float:
        """What the module may lose; below 0 where it must not."""
        return min((self._left[group] for group in self._of.get(name, [])), default=-1.0)

    def spend(self, name: str, loss: float) -> bool:
        """Take `loss` from all groups of the module, or from none if one of them has not so much left."""
        if loss > self.of(name):
            return False
        for group in self._of[name]:
            self._left[group] -= loss
        return True


def _take_back(ladders: Mapping[str, Ladder], taken: dict[str, int], slack: _Slack) -> None:
    """Whole tails of ladders, the least gain per byte first; a module is left alone once its last item is needed."""
    tails = [
        (float(ladder.gains[index]) / max(int(ladder.costs[index]), 1), -index, name)
        for name, ladder in ladders.items()
        for index in range(ladder.floor, taken[name])
        if ladder.gains[index] <= slack.of(name)
    ]
    for _, negative, name in sorted(tails):
        index, ladder = -negative, ladders[name]
        if (
            taken[name] == index + 1
            and (ladder.costs[index] > 0 or not ladder.gains[index])
            and slack.spend(name, ladder.gains[index])
        ):
            taken[name] = index
    for name in sorted(ladders, key=lambda name: float(ladders[name].gains[: taken[name]].sum())):
        ladder = ladders[name]
        if (
            taken[name]
            and not ladder.floor
            and ladder.bytes(taken[name])
            and slack.spend(name, float(ladder.gains[: taken[name]].sum()))
        ):
            taken[name] = 0


def _hull(ladders: Mapping[str, Ladder]) -> _Steps:
    """Hull steps above the floors; items that gain nothing are no steps."""
    columns: list[list[NDArray]] = [[], [], [], []]
    slopes: list[Floats] = []
    for index, ladder in enumerate(ladders.values()):
        costs, gains = ladder.costs[ladder.floor :], ladder.gains[ladder.floor :]
        useful = int(np.count_nonzero(gains))  # gains fall to zero at the end, if at all
        costs, gains = costs[:useful], gains[:useful]
        counts = np.ones(useful, dtype=np.int64)
        if useful and not ladder.floor:
            head = 1 + int(np.argmax(np.cumsum(gains) / np.maximum(np.cumsum(costs) + ladder.fixed, 1)))
            costs = np.concatenate([[costs[:head].sum() + ladder.fixed], costs[head:]])
            gains = np.concatenate([[gains[:head].sum()], gains[head:]])
            counts = np.concatenate([[head], counts[head:]])
        with np.errstate(divide="ignore"):
            slopes.append(np.minimum.accumulate(gains / costs))  # rounding must not put an item before its predecessor
        for column, values in zip(columns, (np.full(len(counts), index), counts, costs, gains), strict=True):
            column.append(values)
    owner, count, cost = (np.concatenate(column).astype(np.int64) if column else np.zeros(0, np.int64) for column in columns[:3])
    gain = np.concatenate(columns[3]).astype(np.float64) if columns[3] else np.zeros(0)
    order = np.argsort(-np.concatenate(slopes), kind="stable") if slopes else np.zeros(0, np.int64)
    return _Steps(owner[order], count[order], cost[order], gain[order])


def _part_of_head(ladder: Ladder, left: int) -> tuple[int, int]:
    """The most items of an untouched ladder that fit into `left` bytes, and what is left then."""
    useful = int(np.count_nonzero(ladder.gains))
    count = int(np.searchsorted(np.cumsum(ladder.costs[:useful]) + ladder.fixed, left, side="right"))
    return count, left - ladder.bytes(count)
