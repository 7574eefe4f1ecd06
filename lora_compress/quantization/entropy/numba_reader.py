"""A reader of entropy-coded payloads on the loops of `kernels`: the bytes are those of `ans`, and other threads work meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import cache, lru_cache
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np

from .ans import CHECK_BITS, AnsReader, joint_counts, stack_words, uniform
from .passes import check_escaped
from .steps import Kind, Passes, plan_steps
from .tables import CONTEXTS, PRECISION

__all__ = ["LOOKUP_BITS", "PLAIN", "CompiledReader", "compiled_kernels"]

_WORD_BITS = 32
LOOKUP_BITS = 9  # of a quantile: the tables of a module stay in the cache
PLAIN = -1  # the kind of a step that reads symbols of which none is an escape
_MOST_TABLES = len(CONTEXTS)  # of a step


@cache
def compiled_kernels() -> ModuleType | None:
    """The module `kernels`, None where numba is not installed."""
    try:
        from . import numba_kernels as kernels
    except ImportError:
        return None
    return kernels


class _Tables:
    """All tables that a process has met, numbered, in the arrays that `kernels.read_steps` takes."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._bounds: list[np.ndarray] = []
        self._arrays: tuple[np.ndarray, ...] = ()
        self._lock = Lock()
        for count in (4, 256):  # those of escaped integers come first
            self.number(uniform, count)

    def number(self, counts_of: Callable[..., np.ndarray], *key: Any) -> int:
        """Of the table counts_of(*key)."""
        name = (counts_of, *key)
        if name not in self._numbers:
            bounds = np.concatenate([[0], np.cumsum(counts_of(*key))]).astype(np.uint64)
            with self._lock:
                if name not in self._numbers:
                    self._bounds.append(bounds)
                    self._numbers[name] = len(self._bounds) - 1
        return self._numbers[name]

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Bounds of all tables, where each table's begin, and the symbols at which the search begins."""
        with self._lock:
            known = len(self._arrays[2]) if self._arrays else 0
            if fresh := self._bounds[known:]:
                quantiles = np.arange(1 << LOOKUP_BITS, dtype=np.uint64) << np.uint64(PRECISION - LOOKUP_BITS)
                first = np.array([np.searchsorted(bounds, quantiles, side="right") - 1 for bounds in fresh], dtype=np.uint16)
                starts = np.cumsum([0, *map(len, self._bounds)])
                self._arrays = np.concatenate(self._bounds), starts, np.concatenate([*self._arrays[2:], first])
            return self._arrays


_tables = cache(_Tables)


@lru_cache(maxsize=4096)
def _numbered(passes: Passes) -> list[tuple[int, ...]]:
    """Of each step: kind, plane, number of tables, and their numbers."""
    found = []
    for kind, plane, tables, above in plan_steps(passes):
        grouped = (joint_counts,) if kind == Kind.BITS else ()
        numbers = [_tables().number(*grouped, *table) for table in tables]
        found.append((int(kind), above or plane, len(numbers), *numbers, *[0] * (_MOST_TABLES - len(numbers))))
    return found


class CompiledReader(AnsReader):
    """As its parent, which also reads the runs of a layer at once. It takes numba."""

    def __init__(self, chunk: bytes) -> None:
        self._words = stack_words(chunk)
        self._words_left = max(len(self._words) - 2, 0)
        self._head = sum(word << _WORD_BITS * i for i, word in enumerate(self._words[self._words_left :].tolist()))

    def read(self, count: int, counts_of: Callable[..., np.ndarray], *key: Any) -> np.ndarray:
        """The next `count` symbols, int32."""
        symbols = np.empty(count, dtype=np.int32)
        self._take([(0, count, PLAIN, 0, 1, _tables().number(counts_of, *key), *[0] * (_MOST_TABLES - 1))], symbols)
        return symbols

    def read_runs(self, known: np.ndarray, turns: Iterable[tuple[slice, Passes]]) -> None:
        """As `passes.read_steps`, for some runs after each other: where each is in `known`, and the passes over it."""
        steps = [(place.start, place.stop, *step) for place, passes in turns for step in _numbered(passes)]
        if steps:
            check_escaped(self._take(steps, known))

    def left(self) -> int:
        """The number below all symbols, if none is left; otherwise 2^16 or more."""
        return 1 << CHECK_BITS if self._words_left else self._head

    def _take(self, steps: list[tuple[int, ...]], known: np.ndarray) -> int:
        """Take steps; the largest integer that an escape stands for."""
        kernels: Any = compiled_kernels()
        state = self._words, self._words_left, np.uint64(self._head)
        self._words_left, self._head, largest = kernels.read_steps(*state, *_tables().arrays(), np.array(steps), known)
        return int(largest)
