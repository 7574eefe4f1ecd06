"""The steps in which a run's integers are told, and the table that codes each: the same for writers and readers."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

from .ans import uniform
from .schedule import Stage, lowest_symbol_plane
from .tables import base_counts, bit_contexts, bit_counts, fine_planes, split_counts

__all__ = ["Kind", "Passes", "Step", "Table", "plan_steps", "symbol_table"]

Table = tuple[Any, ...]  # a function that makes counts, and what to call it with


class Kind(IntEnum):
    """What a step tells.

    Args:
        SYMBOLS: all values at a plane.
        RAW: of all values the bits from a plane above down to it, as good as uniform: of values that are zero there by the first
            table, of others by the second.
        SPLIT: what values that were zero one plane higher are.
        BITS: the next bit of the others: of magnitude 1 there by the first table, of magnitude 2 by the second, of all beyond the
            last table by the last.
    """

    SYMBOLS = 0
    RAW = 1
    SPLIT = 2
    BITS = 3


class Step(NamedTuple):
    """A step that leads to values at `plane`, from `above`, where that matters."""

    kind: Kind
    plane: int
    above: int
    tables: tuple[Table, ...]


def symbol_table(scale: int, shape: int, plane: int = 0) -> Table:
    """Of values at a plane where they have this scale; its last symbol is the escape."""
    return base_counts, scale, shape, fine_planes(scale, plane)


class Passes(NamedTuple):
    """What leads a run with a model from one stage, or from nothing, to a further one."""

    scale: int
    shape: int
    before: Stage | None
    after: Stage


@lru_cache(maxsize=4096)
def plan_steps(passes: Passes) -> tuple[Step, ...]:
    """Their steps."""
    scale, shape, before, after = passes
    steps: list[Step] = []
    if before is None:
        before = Stage(after.plane + after.halved)
        steps += _first(scale, shape, before.plane)
    for left in reversed(range(after.left, before.left)):
        plane, halved = divmod(left, 2)
        here = scale - 8 * plane
        if halved:
            steps.append(Step(Kind.SPLIT, plane, plane + 1, ((split_counts, here, shape, plane),)))
        else:
            tables = tuple((bit_counts, here, shape, plane, context) for context in range(1, bit_contexts(here) + 1))
            steps.append(Step(Kind.BITS, plane, plane + 1, tables))
    return tuple(steps)


def _first(scale: int, shape: int, target: int) -> Iterator[Step]:
    """From nothing to all values at a plane."""
    plane = max(target, lowest_symbol_plane(scale))
    yield Step(Kind.SYMBOLS, plane, plane, (symbol_table(scale - 8 * plane, shape, plane),))
    if plane > target:
        width = plane - target
        yield Step(Kind.RAW, target, plane, ((uniform, (2 << width) - 1), (uniform, 1 << width)))
