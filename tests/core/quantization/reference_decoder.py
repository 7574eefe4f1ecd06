"""The entropy payload read by docs/format_entropy.md alone, in plain Python: it shares no code with the package."""

from __future__ import annotations

import zlib

from tests.core.quantization.reference_tables import base, bit, centre, normalise, split, uniform

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


def read_symbols(stack: Stack, count: int, scale: int, shape: int, plane: int) -> list[int]:
    fine = min(plane, (64 - scale) // 8)
    counts = base(scale, shape, fine)
    escape = len(counts) - 1
    symbols = [stack.read(counts) for _ in range(count)]
    places = [place for place, symbol in enumerate(symbols) if symbol == escape]
    lengths = [1 + stack.read(uniform(4)) for _ in places]
    for place, length in zip(places, lengths, strict=True):
        symbols[place] += sum(stack.read(uniform(256)) << 8 * byte for byte in range(length))
    return symbols


def value(symbol: int) -> int:
    return (symbol + 1) // 2 if symbol % 2 else -(symbol // 2)


def stage_after(layer: int, layers: int, per_plane: int) -> tuple[int, bool]:
    """Plane, and whether the last bits of magnitudes above 1 are pending."""
    left = layers - 1 - layer
    return left // per_plane, left % per_plane > 0


def decode(
    chunks: list[bytes], rank: int, inputs: int, outputs: int, step: float, layers: int, per_plane: int
) -> list[list[list[float]]]:
    stacks = [Stack(chunk) for chunk in chunks]
    rows: dict[int, list[float]] = {i: [0.0] * (inputs if i < rank else outputs) for i in range(2 * rank)}
    side, runs = Side(rank), []
    for layer, stack in enumerate(stacks):
        stage = stage_after(layer, layers, per_plane)
        fresh: dict[tuple[int, int], list[int]] = {}
        for i in side.read(stack, layer == layers - 1):
            assert 8 * sum(stage) < side.scale[i] <= 168 and side.shape[i] < 4
            fresh.setdefault((side.scale[i], side.shape[i]), []).append(i)
        for (scale, shape), members in fresh.items():
            runs.append(Run(scale, shape, layer, sorted(members), [len(rows[i]) for i in sorted(members)]))
        runs.sort(key=lambda run: (run.scale, run.shape, run.start))
        for run in runs:
            run.read(stack, *stage)
        assert not stack.words
        following = [zlib.crc32(chunk) & 0xFFFF for chunk in chunks[layer + 1 :] if chunk and chunks[layer]]
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
            (count,) = read_symbols(stack, 1, 33, 0, 0)
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
        return [value(symbol) for symbol in read_symbols(stack, count, *self.tables[row], 0)]


def read_grouped(stack: Stack, count: int, counts: list[int]) -> list[int]:
    """Section 2, groups."""
    kinds = len(counts)
    width = {2: 8, 3: 5}[kinds]
    masses = []
    for group in range(kinds**width):
        mass = 1
        for digit in range(width):
            mass *= counts[group // kinds**digit % kinds]
        masses.append(mass)
    table = normalise(masses)
    symbols = []
    for _ in range((count + width - 1) // width):
        group = stack.read(table)
        symbols += [group // kinds ** (width - 1 - place) % kinds for place in range(width)]
    return symbols[:count]


class Run:
    """Rows that share tables, one after the other: their values in units of 2^plane; `pending`: magnitudes above 1 lack a bit."""

    def __init__(self, scale: int, shape: int, start: int, members: list[int], widths: list[int]) -> None:
        self.scale, self.shape, self.start, self.members, self.widths = scale, shape, start, members, widths
        self.plane, self.pending = -1, False
        self.width = sum(widths)
        self.values: list[int] = []

    def read(self, stack: Stack, plane: int, halved: bool) -> None:
        if not self.values:
            self._first(stack, plane + halved)
        while (self.plane, self.pending) != (plane, halved):
            if self.pending:
                self._bits(stack)
            else:
                self._split(stack)

    def _first(self, stack: Stack, target: int) -> None:
        plane = max(target, 0 if self.scale <= _MAX else -(-(self.scale - _MAX) // 8))
        symbols = read_symbols(stack, self.width, self.scale - 8 * plane, self.shape, plane)
        self.values = [value(symbol) for symbol in symbols]
        bits = plane - target
        if bits:
            zeros = [i for i, v in enumerate(self.values) if v == 0]
            others = [i for i, v in enumerate(self.values) if v]
            self.values = [v << bits for v in self.values]
            for i in zeros:
                self.values[i] = value(stack.read(uniform((2 << bits) - 1)))
            for i in others:
                low = stack.read(uniform(1 << bits))
                self.values[i] += low if self.values[i] > 0 else -low
        self.plane = target

    def _split(self, stack: Stack) -> None:
        self.plane, self.pending = self.plane - 1, True
        counts = split(self.scale - 8 * self.plane, self.shape, self.plane)
        fresh = iter(read_grouped(stack, self.values.count(0), counts))
        self.values = [2 * v if v else value(next(fresh)) for v in self.values]

    def _bits(self, stack: Stack) -> None:
        scale = self.scale - 8 * self.plane
        contexts = 3 if scale <= 40 else 1
        for context in range(1, contexts + 1):
            places = [i for i, v in enumerate(self.values) if abs(v) > 1 and min(abs(v) // 2, contexts) == context]
            lows = read_grouped(stack, len(places), bit(scale, self.shape, self.plane, context))
            for i, low in zip(places, lows, strict=True):
                self.values[i] += low if self.values[i] > 0 else -low
        self.pending = False

    def expected(self) -> list[tuple[int, list[float]]]:
        """Rows by their numbers."""
        found = self._expected()
        ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths))]
        return [(i, found[end - width : end]) for i, end, width in zip(self.members, ends, self.widths, strict=True)]

    def _expected(self) -> list[float]:
        result = []
        for v in self.values:
            wide = int(self.pending and abs(v) > 1)
            cell = abs(v) >> wide
            distance = centre(self.scale - 8 * self.plane, self.shape, self.plane, wide, cell) * 2**self.plane
            result.append(distance if v > 0 else -distance if v else 0.0)
        return result
