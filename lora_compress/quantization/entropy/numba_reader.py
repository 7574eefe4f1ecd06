"""A reader of entropy-coded payloads on the loops of `numba_kernels`, and the choice between it and the one of `ans`.

Both read the same bytes. This one is faster once its loops are loaded, and lets other threads work meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import cache, lru_cache
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import FormatError
from .ans import CHECK_BITS, AnsReader, joint_counts, stack_words, uniform
from .symbols import check_escaped
from .tables import CONTEXTS, PRECISION
from .values import Kind, Pass

__all__ = ["LOOKUP_BITS", "PLAIN", "CompiledReader", "compiled_kernels", "kernels_for", "open_reader"]

Turn = tuple[slice, tuple[Any, ...]]
_WORD_BITS = 32
LOOKUP_BITS = 9  # of a quantile: the tables of a module stay in the cache
PLAIN = -1  # the kind of a pass that reads symbols of which none is an escape
_MOST_TABLES = len(CONTEXTS)  # of a pass
_WORTH_COMPILING = 1 << 22  # weights that a process decodes before it takes the time to load the loops
_decoded = 0  # weights in this process, closely: threads may lose some


@cache
def compiled_kernels() -> ModuleType | None:
    """Return the module `numba_kernels`, None where numba is not installed."""
    try:
        from . import numba_kernels as kernels
    except ImportError:
        return None
    return kernels


def kernels_for(weights: int) -> ModuleType | None:
    """Return the compiled loops if this process has decoded so much that loading them pays; it will decode some more weights."""
    global _decoded
    _decoded += weights
    return compiled_kernels() if _decoded - weights > _WORTH_COMPILING else None


def open_reader(chunk: bytes, kernels: ModuleType | None) -> AnsReader:
    """Return a reader of a chunk, on the compiled loops where these are given.

    Raises:
        FormatError: the bytes are none that a writer makes.
    """
    try:
        return CompiledReader(chunk) if kernels else AnsReader(chunk)
    except ValueError as error:
        raise FormatError(f"an entropy-coded payload cannot be read: {error}") from error


class _Tables:
    """All tables that a process has met, numbered, in the arrays that `numba_kernels.read_passes` takes."""

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
def _numbered(plan: Callable[..., tuple[Pass, ...]], *key: Any) -> list[tuple[int, ...]]:
    """Of each pass that plan(*key) names: kind, plane, number of tables, and their numbers."""
    found = []
    for kind, plane, tables, above in plan(*key):
        grouped = (joint_counts,) if kind == Kind.BITS else ()
        numbers = [_tables().number(*grouped, *table) for table in tables]
        found.append((int(kind), above or plane, len(numbers), *numbers, *[0] * (_MOST_TABLES - len(numbers))))
    return found


class CompiledReader(AnsReader):
    """As its parent, which also reads the runs of a stage at once. It takes numba."""

    def __init__(self, chunk: bytes) -> None:
        self._words = stack_words(chunk)
        self._words_left = max(len(self._words) - 2, 0)
        self._head = sum(word << _WORD_BITS * i for i, word in enumerate(self._words[self._words_left :].tolist()))

    def read(self, count: int, counts_of: Callable[..., np.ndarray], *key: Any) -> np.ndarray:
        """The next `count` symbols, int32."""
        symbols = np.empty(count, dtype=np.int32)
        self._take([(0, count, PLAIN, 0, 1, _tables().number(counts_of, *key), *[0] * (_MOST_TABLES - 1))], symbols)
        return symbols

    def read_runs(self, known: np.ndarray, plan: Callable[..., tuple[Pass, ...]], turns: Iterable[Turn]) -> None:
        """Do as `planes.read_passes` for some runs after each other.

        Args:
            known: symbols of all runs, int32; filled in.
            plan: returns passes; it is called once for each key that a process meets.
            turns: where each run is in `known`, and the arguments of `plan` for its passes.
        """
        numbered = [(place.start, place.stop, *each) for place, key in turns for each in _numbered(plan, *key)]
        if numbered:
            check_escaped(self._take(numbered, known))

    def left(self) -> int:
        """The number below all symbols, if none is left; otherwise 2^16 or more."""
        return 1 << CHECK_BITS if self._words_left else self._head

    def _take(self, passes: list[tuple[int, ...]], known: np.ndarray) -> int:
        """Make passes; return the largest integer that an escape stands for."""
        kernels: Any = compiled_kernels()
        state = self._words, self._words_left, np.uint64(self._head)
        self._words_left, self._head, largest = kernels.read_passes(*state, *_tables().arrays(), np.array(passes), known)
        return int(largest)
