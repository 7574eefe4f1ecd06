"""The loops of the compiled reader. Importing them takes numba, and half a second; the first call ever, some seconds of compiling.

A stage is a list of passes over one array of symbols: those of all runs of a module, one run after the other. A pass does what
`planes.read_passes` does. The stack is its words, of which `left` are not yet used, and its `head`, the coder's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from .numba_reader import LOOKUP_BITS, PLAIN
from .tables import CONTEXTS, PRECISION
from .values import Kind

__all__ = ["look_up", "read_passes"]

Array = np.ndarray
Table = tuple[Array, Array]  # cumulative counts from 0 to 2^24, uint64, and the symbols at which the search begins, uint16
State = tuple[int, np.uint64]  # left and head

_PRECISION = np.uint64(PRECISION)
_MASK = np.uint64((1 << PRECISION) - 1)
_SHIFT = np.uint64(PRECISION - LOOKUP_BITS)
_WORD = np.uint64(32)
_SYMBOLS, _RAW, _SIGNED = int(Kind.SYMBOLS), int(Kind.RAW), int(Kind.SIGNED)
_LENGTHS, _OCTETS = 0, 1  # the tables of escaped integers
_EDGES = np.array(CONTEXTS, dtype=np.int64)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """In machine code that is kept beside this file, or in the user's cache, if either can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@_compiled
def _next(words: Array, left: int, head: np.uint64, bounds: Array, first: Array) -> Any:
    """The next symbol, and the stack after it."""
    quantile = head & _MASK
    symbol = np.int64(first[quantile >> _SHIFT])
    while bounds[symbol + 1] <= quantile:
        symbol += 1
    head = (head >> _PRECISION) * (bounds[symbol + 1] - bounds[symbol]) + (quantile - bounds[symbol])
    if not head >> _WORD and left > 0:
        left -= 1
        head = head << _WORD | np.uint64(words[left])
    return symbol, left, head


@_compiled
def _placed(symbol: int, plane: int) -> int:
    positive = symbol & 1
    return ((symbol + positive) << plane) - positive


@_compiled
def _plain(words: Array, left: int, head: np.uint64, table: Table, symbols: Array) -> State:
    bounds, first = table
    for i in range(len(symbols)):
        symbols[i], left, head = _next(words, left, head, bounds, first)
    return left, head


@_compiled
def _escaped(
    words: Array, left: int, head: np.uint64, lengths: Table, octets: Table, symbols: Array, escape: int
) -> tuple[int, np.uint64, int]:
    """Add what the escapes among symbols stand for; also the largest of that."""
    places = np.nonzero(symbols == escape)[0]
    sizes = np.empty(len(places), dtype=np.int64)
    left, head = _plain(words, left, head, lengths, sizes)
    bounds, first = octets
    largest = 0
    for i in range(len(places)):
        extra = 0
        for octet in range(sizes[i] + 1):
            value, left, head = _next(words, left, head, bounds, first)
            extra |= value << 8 * octet
        largest = max(largest, extra)
        symbols[places[i]] += extra
    return left, head, largest


@_compiled
def _raw(words: Array, left: int, head: np.uint64, small: Table, bits: Table, known: Array, above: int) -> State:
    bounds, first = small
    for i in range(len(known)):
        if not known[i]:
            symbol, left, head = _next(words, left, head, bounds, first)
            known[i] = -symbol - 1  # told from the others until these are read
    bounds, first = bits
    for i in range(len(known)):
        if known[i] < 0:
            known[i] = -known[i] - 1
        else:
            symbol, left, head = _next(words, left, head, bounds, first)
            known[i] = _placed(known[i], above) + (symbol << 1)
    return left, head


@_compiled
def _bits(
    words: Array,
    left: int,
    head: np.uint64,
    table: Table,
    known: Array,
    least: int,
    most: int,
    skipped: int,
    places: Array,
) -> State:
    """Next bits of values whose signed symbols one plane higher are within a range, but for one that is skipped."""
    bounds, first = table
    count = 0
    for i in range(len(known)):
        before = known[i] >> 2 << 1 | known[i] & 1
        places[count] = i
        count += int(least <= before <= most and before != skipped)
    for begin in range(0, count, 8):
        group, left, head = _next(words, left, head, bounds, first)
        for digit in range(min(8, count - begin)):
            known[places[begin + digit]] |= (group >> 7 - digit & 1) << 1
    return left, head


@_compiled
def _without_signed_zeros(known: Array) -> None:
    """Signed symbols at plane 0, where a negative zero of the plane before is still -0, as symbols."""
    for i in range(len(known)):
        symbol = known[i]
        known[i] = 2 if symbol == 1 else max(symbol - 1, 0)


@_compiled
def _table(bounds: Array, starts: Array, first: Array, number: int) -> Table:
    return bounds[starts[number] : starts[number + 1]], first[number]


@_compiled
def read_passes(
    words: Array, left: int, head: np.uint64, bounds: Array, starts: Array, first: Array, passes: Array, known: Array
) -> tuple[int, np.uint64, int]:
    """Make passes: `known` is filled in.

    Args:
        words: (n,), uint32, with `left` and `head`: the stack.
        bounds: of all tables, one after the other, uint64: cumulative counts, from 0 to 2^24.
        starts: (tables + 1,), int64, where each begins in `bounds`. The first two are those of escaped integers.
        first: (tables, 2^9), uint16: the symbol with which a quantile that begins with these bits may begin.
        passes: (passes, 10), int64: begin and end of the run in `known`, kind, plane (of RAW: above), number of tables, these.
        known: symbols, int32.

    Returns:
        left, head, and the largest integer that an escape stood for, in units of the last plane.
    """
    largest = 0
    places = np.empty(len(known) + 1, dtype=np.int32)
    lengths, octets = _table(bounds, starts, first, _LENGTHS), _table(bounds, starts, first, _OCTETS)
    for step in passes:
        begin, end, kind, plane, count = step[:5]
        run, numbers = known[begin:end], step[5:]
        table = _table(bounds, starts, first, numbers[0])
        if kind in (_SYMBOLS, _SIGNED, PLAIN):
            left, head = _plain(words, left, head, table, run)
            escape = len(table[0]) - 2
            if kind != PLAIN and len(run) and run.max() == escape:
                left, head, extra = _escaped(words, left, head, lengths, octets, run, escape)
                largest = max(largest, extra << plane)
        elif kind == _RAW:
            left, head = _raw(words, left, head, table, _table(bounds, starts, first, numbers[1]), run, plane)
        else:
            for i in range(len(run)):
                run[i] = run[i] >> 1 << 2 | run[i] & 1
            for number in range(count):
                context = number + int(number > 0 and count < len(_EDGES))
                least, most = _EDGES[context, 0], _EDGES[context if count > 1 else -1, 1]
                table = _table(bounds, starts, first, numbers[number])
                left, head = _bits(words, left, head, table, run, least, most, -1 if plane else 1, places)
            if not plane:
                _without_signed_zeros(run)
    return left, head, largest


@_compiled
def look_up(symbols: Array, rows: Array, tables: Array, weights: Array) -> None:
    """Weights of symbols.

    Args:
        symbols: (n,), int32.
        rows: (r, 3), int64: where a row begins in `symbols` and in `weights`, its width.
        tables: (r, k), what each row's symbols 0, 1, ..., k - 1 stand for; the last stands for all larger ones.
        weights: filled in, of the type of `tables`.
    """
    last = np.uint64(tables.shape[1] - 1)
    for row in range(len(rows)):
        begin, target, width = rows[row]
        for i in range(width):
            weights[target + i] = tables[row, min(np.uint64(symbols[begin + i]), last)]
