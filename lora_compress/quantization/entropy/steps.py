"""The steps in which a run's integers are told, and the table that codes each: the same for writers and readers."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

from .ans import uniform
from .stages import lowest_symbol_plane
from .tables import CONTEXTS, base_counts, bit_contexts, bit_counts, fine_planes, signed_counts

__all__ = ["Kind", "Passes", "Step", "Table", "plan_steps", "symbol_table"]

Table = tuple[Any, ...]  # a function that makes counts, and what to call it with


class Kind(IntEnum):
    """What a step tells.

    Args:
        SYMBOLS: all values at a plane, zero without a sign.
        RAW: of all values the bits from a plane above down to 0, as good as uniform: of values that are zero there by the first
            table, of others by the second.
        SIGNED: all values at a plane, zero with a sign.
        BITS: the next bit of all values that are known with the sign of zero: by one table, or each context by its own. At plane 0
            a negative zero can only be -1, and nothing is told of it.
    """

    SYMBOLS = 0
    RAW = 1
    SIGNED = 2
    BITS = 3


class Step(NamedTuple):
    """A step that leads to values at `plane`.

    Args:
        kind: what it tells.
        plane: down to which values are known after it.
        tables: that code it.
        above: the plane before a RAW step.
    """

    kind: Kind
    plane: int
    tables: tuple[Table, ...]
    above: int = 0

    @property
    def contexts(self) -> tuple[tuple[int, int], ...]:
        """First and last signed symbol before a BITS step of the values that each table is for."""
        count = len(self.tables)
        if count == 1:
            return ((0, CONTEXTS[-1][1]),)
        return CONTEXTS if count == len(CONTEXTS) else (CONTEXTS[0], *CONTEXTS[2:])


def symbol_table(scale: int, shape: int, plane: int = 0) -> Table:
    """Of values at a plane where they have this scale; its last symbol is the escape."""
    return base_counts, scale, shape, fine_planes(scale, plane)


class Passes(NamedTuple):
    """What leads a run with a model from one plane, or from nothing, to a lower one."""

    scale: int
    shape: int
    before: int | None
    after: int


@lru_cache(maxsize=4096)
def plan_steps(passes: Passes) -> tuple[Step, ...]:
    """Their steps."""
    scale, shape, before, after = passes
    steps: list[Step] = []
    if before is None:
        before = max(after, lowest_symbol_plane(scale))
        if not after:
            return tuple(_whole(scale, shape, before))
        steps.append(Step(Kind.SIGNED, before, ((signed_counts, scale - 8 * before, shape, before),)))
    for plane in reversed(range(after, before)):
        here = scale - 8 * plane
        contexts = bit_contexts(here, plane)
        steps.append(Step(Kind.BITS, plane, tuple((bit_counts, here, shape, plane, context) for context in contexts)))
    return tuple(steps)


def _whole(scale: int, shape: int, plane: int) -> Iterator[Step]:
    """From nothing to all values, told at a plane first."""
    yield Step(Kind.SYMBOLS, plane, (symbol_table(scale - 8 * plane, shape, plane),))
    if plane:
        yield Step(Kind.RAW, 0, ((uniform, (2 << plane) - 1), (uniform, 1 << plane)), plane)
