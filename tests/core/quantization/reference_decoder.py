"""The entropy payload read by docs/format_entropy.md alone, in plain Python: it shares no code with the package."""

from __future__ import annotations

import zlib

from tests.core.quantization.reference_tables import base, bit, centre, normalise, signed, uniform

_MAX = 56


class Stack:
    """The coder of section 1."""

    def __init__(self, chunk: bytes) -> None:
        chunk += bytes(-len(chunk) % 4)
        self.words = [int.from_bytes(chunk[i : i + 4], "little") for i in range(0, len(chunk), 4)]
        self.state = self._pop() << 32 | self._pop() if len(self.words) > 1 else self._pop()

    def _pop(self) -> int:
        return self.words.pop() if self.words else 0

    def read(self, counts: list[int]) -> int:
        assert sum(counts) == 1 << 24 and min(counts) > 0
        quantile, start, symbol = self.state & 0xFFFFFF, 0, 0
        while start + counts[symbol] <= quantile:
            start += counts[symbol]
            symbol += 1
        self.state = (self.state >> 24) * counts[symbol] + quantile - start
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self._pop()
        return symbol

    @property
    def empty(self) -> bool:
        return not self.words and self.state == 0


def read_symbols(stack: Stack, count: int, counts: list[int]) -> list[int]:
    escape = len(counts) - 1
    symbols = [stack.read(counts) for _ in range(count)]
    places = [place for place, symbol in enumerate(symbols) if symbol == escape]
    lengths = [1 + stack.read(uniform(4)) for _ in places]
    for place, length in zip(places, lengths, strict=True):
        symbols[place] += sum(stack.read(uniform(256)) << 8 * byte for byte in range(length))
    return symbols


def value(symbol: int) -> int:
    return (symbol + 1) // 2 if symbol % 2 else -(symbol // 2)


def decode(
    chunks: list[bytes], rank: int, inputs: int, outputs: int, step: float, layers: int, per_plane: int
) -> list[list[list[float]]]:
    stacks = [Stack(chunk) for chunk in chunks]
    rows: dict[int, list[float]] = {i: [0.0] * (inputs if i < rank else outputs) for i in range(2 * rank)}
    side, runs = Side(rank), []
    for layer, stack in enumerate(stacks):
        plane = (layers - 1 - layer) // per_plane
        fresh: dict[tuple[int, int], list[int]] = {}
        for i in side.read(stack, layer == layers - 1):
            assert 8 * plane < side.scale[i] <= 168 and side.shape[i] < 4
            fresh.setdefault((side.scale[i], side.shape[i]), []).append(i)
        for (scale, shape), members in fresh.items():
            runs.append(Run(scale, shape, layer, sorted(members), [len(rows[i]) for i in sorted(members)]))
        runs.sort(key=lambda run: (run.scale, run.shape, run.start))
        for run in runs:
            run.read(stack, plane)
        assert not stack.words
        following = [
            zlib.crc32(chunk) & (0xFFFF if len(chunk) >= 256 else 0xFF) for chunk in chunks[layer + 1 :] if chunk and chunks[layer]
        ]
        unknown = chunks[layer] and not following and len(chunks) < layers
        assert stack.state < 1 << 16 if unknown else stack.state == (following or [0])[0]
    for run in runs:
        rows |= {i: [step * 2 ** (-side.gain[i % rank] / 8) * x for x in row] for i, row in run.expected()}
    return [[rows[i] for i in range(rank)], [rows[rank + i] for i in range(rank)]]


class Side:
    """Section 3: of the components that have started, gains by component, scales and shapes by row; up's rows follow down's."""

    def __init__(self, rank: int) -> None:
        self.rank, self.tables, self.middles = rank, [], []
        self.gain: list[int] = []
        self.scale: dict[int, int] = {}
        self.shape: dict[int, int] = {}

    def read(self, stack: Stack, last: bool) -> list[int]:
        """Numbers of the rows that start."""
        begin, first = len(self.gain), not self.gain
        count = self.rank - begin
        if count and not last:
            (count,) = read_symbols(stack, 1, base(33, 0, 0))
            assert count <= self.rank - begin
        if not count:
            return []
        gains, offsets, shapes = (self._integers(stack, i, size) for i, size in enumerate((count, 2 * (count + first), 2 * count)))
        for i in range(count):
            self.gain.append(gains[i] + (self.gain[-1] if self.gain else 0))
        if first:
            self.middles = [offsets.pop(count + 1), offsets.pop(0)][::-1]
        told = [factor * self.rank + begin + i for factor in range(2) for i in range(count)]
        for number, offset, shape in zip(told, offsets, shapes, strict=True):
            self.scale[number] = self.middles[number // self.rank] + offset + 2 * self.gain[number % self.rank]
            self.shape[number] = 2 * shape - 1 if shape > 0 else -2 * shape
        return told

    def _integers(self, stack: Stack, row: int, count: int) -> list[int]:
        if row == len(self.tables):
            self.tables.append(divmod(stack.read(uniform(256)), 4))
        return [value(symbol) for symbol in read_symbols(stack, count, base(*self.tables[row], 0))]


def read_grouped(stack: Stack, count: int, counts: list[int]) -> list[int]:
    """Section 2, groups."""
    masses = []
    for group in range(256):
        mass = 1
        for digit in range(8):
            mass *= counts[group >> digit & 1]
        masses.append(mass)
    table = normalise(masses)
    bits: list[int] = []
    for _ in range((count + 7) // 8):
        group = stack.read(table)
        bits += [group >> 7 - place & 1 for place in range(8)]
    return bits[:count]


class Run:
    """Rows that share tables, one after the other: their signed symbols at `plane`, at plane 0 as values."""

    def __init__(self, scale: int, shape: int, start: int, members: list[int], widths: list[int]) -> None:
        self.scale, self.shape, self.start, self.members, self.widths = scale, shape, start, members, widths
        self.plane = -1
        self.width = sum(widths)
        self.symbols: list[int] = []

    def read(self, stack: Stack, plane: int) -> None:
        if self.plane < 0:
            highest = 0 if self.scale <= _MAX else -(-(self.scale - _MAX) // 8)
            if plane:
                self.plane = max(plane, highest)
                self.symbols = read_symbols(stack, self.width, signed(self.scale - 8 * self.plane, self.shape, self.plane))
            else:
                self.plane = 0
                self.symbols = self._whole(stack, highest)
        while self.plane > plane:
            self._bits(stack)

    def _whole(self, stack: Stack, plane: int) -> list[int]:
        scale = self.scale - 8 * plane
        table = base(scale, self.shape, min(plane, (64 - scale) // 8))
        values = [value(symbol) for symbol in read_symbols(stack, self.width, table)]
        if plane:
            zeros = [i for i, v in enumerate(values) if v == 0]
            others = [i for i, v in enumerate(values) if v]
            values = [v << plane for v in values]
            for i in zeros:
                values[i] = value(stack.read(uniform((2 << plane) - 1)))
            for i in others:
                low = stack.read(uniform(1 << plane))
                values[i] += low if values[i] > 0 else -low
        return [2 * abs(v) + (v < 0) for v in values]

    def _bits(self, stack: Stack) -> None:
        self.plane -= 1
        scale = self.scale - 8 * self.plane
        before, told = self.symbols, list(range(len(self.symbols)))
        if self.plane == 0:
            told = [i for i in told if before[i] != 1]
        bits = {i: 1 for i, symbol in enumerate(before) if symbol == 1}  # at plane 0, where nothing tells it
        context = [symbol if symbol < 2 else min(symbol // 2 + 1, 4) for symbol in before]
        groups = [told] if scale > 40 else [[i for i in told if context[i] == k] for k in range(5)]
        for k, places in enumerate(groups):
            bits |= dict(zip(places, read_grouped(stack, len(places), bit(scale, self.shape, self.plane, k)), strict=True))
        self.symbols = [2 * (2 * (symbol // 2) + bits[i]) + symbol % 2 for i, symbol in enumerate(before)]

    def expected(self) -> list[tuple[int, list[float]]]:
        """Rows by their numbers."""
        found = [centre(self.scale - 8 * self.plane, self.shape, self.plane, symbol) * 2**self.plane for symbol in self.symbols]
        ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths))]
        return [(i, found[end - width : end]) for i, end, width in zip(self.members, ends, self.widths, strict=True)]
