"""The decoder of constriction's stack, compiled by numba: faster, and other threads may work meanwhile.

It looks the first bits of a symbol's quantile up where constriction searches its table by halves. Optional: pip install numba.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from .tables import PRECISION

__all__ = ["JitDecoder", "SymbolTable", "jit_kernel", "symbol_table"]

Kernel = Callable[..., tuple[int, Any]]

_LOOKUP_BITS = 9  # tables of a module stay in the cache
_WORD_BITS = 32


class SymbolTable(NamedTuple):
    """Counts of symbols as the decoder needs them.

    Args:
        bounds: (symbols + 1,), uint64, cumulative.
        first: (2^9,), int32, the symbol with which a quantile that begins with these bits may begin.
    """

    bounds: np.ndarray
    first: np.ndarray


@lru_cache(maxsize=4096)
def symbol_table(counts_of: Callable[..., np.ndarray], *key: Any) -> SymbolTable:
    """The table of `counts_of(*key)`."""
    bounds = np.concatenate([[0], np.cumsum(counts_of(*key), dtype=np.uint64)]).astype(np.uint64)
    starts = np.arange(1 << _LOOKUP_BITS, dtype=np.uint64) << np.uint64(PRECISION - _LOOKUP_BITS)
    return SymbolTable(bounds, (np.searchsorted(bounds, starts, side="right") - 1).astype(np.int32))


@cache
def jit_kernel() -> Kernel | None:
    """`_decode` in machine code, None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    try:
        return numba.njit(nogil=True, cache=True)(_decode)
    except RuntimeError:  # no folder to keep the machine code in
        return numba.njit(nogil=True)(_decode)


def _decode(
    words: np.ndarray, position: int, state: np.uint64, bounds: np.ndarray, first: np.ndarray, symbols: np.ndarray
) -> tuple[int, np.uint64]:
    """Fill `symbols` from the stack's state and its words below `position`; both as they then are."""
    precision, word, shift = np.uint64(PRECISION), np.uint64(_WORD_BITS), np.uint64(PRECISION - _LOOKUP_BITS)
    mask = (np.uint64(1) << precision) - np.uint64(1)
    for i in range(len(symbols)):
        quantile = state & mask
        symbol = first[quantile >> shift]
        while bounds[symbol + 1] <= quantile:
            symbol += 1
        state = (state >> precision) * (bounds[symbol + 1] - bounds[symbol]) + (quantile - bounds[symbol])
        if not state >> word and position > 0:
            position -= 1
            state = state << word | np.uint64(words[position])
        symbols[i] = symbol
    return position, state


class JitDecoder:
    """constriction's AnsCoder as far as reading goes.

    Args:
        words: (n,), uint32, the stack; the last is no zero.
        kernel: of `jit_kernel`.
    """

    def __init__(self, words: np.ndarray, kernel: Kernel) -> None:
        self._words, self._kernel = words, kernel
        self._position = max(len(words) - 2, 0)
        self._state = sum(int(word) << _WORD_BITS * i for i, word in enumerate(words[self._position :]))

    def decode(self, table: SymbolTable, count: int) -> np.ndarray:
        """The next `count` symbols, int32."""
        symbols = np.empty(count, dtype=np.int32)
        self._position, self._state = self._kernel(self._words, self._position, np.uint64(self._state), *table, symbols)
        return symbols

    def is_empty(self) -> bool:
        """Whether nothing is left."""
        return not self._position and not self._state
