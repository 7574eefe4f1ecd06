"""The entropy payload read by docs/format_entropy.md alone, in plain Python: it shares no code with the package."""

from __future__ import annotations

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


def passes_of(scale: int) -> list[int]:
    """Levels of a row's passes: symbols at the first plane, then split and bits of each plane below."""
    plane = max(0, (scale - 13) // 8)
    levels = [2 * plane - (3 if scale - 8 * plane <= 17 else 2)]
    for below in range(plane - 1, -1, -1):
        here = scale - 8 * below
        levels.append(min(levels[-1], 2 * below - (2 if here <= 23 else 1)))
        levels.append(min(levels[-1], 2 * below - (4 if here <= 21 else 3 if here <= 29 else 2)))
    return levels


def decode(chunks: list[bytes], rank: int, inputs: int, outputs: int, step: float, layers: int) -> list[list[list[float]]]:
    stack = Stack(chunks[0])
    side = []
    for count in (rank, 2 * rank + 2, 2 * rank):
        scale, shape = divmod(stack.read(uniform(256)), 4)
        side.append([value(symbol) for symbol in read_symbols(stack, count, scale, shape, 0)])
    gains = [sum(side[0][: i + 1]) for i in range(rank)]
    scales, shapes = [], []
    for factor in range(2):
        for i in range(rank):
            scales.append(side[1][factor * (rank + 1)] + side[1][factor * (rank + 1) + 1 + i] + 2 * gains[i])
            shape = side[2][factor * rank + i]
            shapes.append(2 * shape - 1 if shape > 0 else -2 * shape)
    firsts = [layers_of(scale, layers)[0] for scale in scales]
    starts = [max(firsts[i % rank], firsts[rank + i % rank]) for i in range(2 * rank)]
    keys = list(zip(scales, shapes, starts, strict=True))
    runs = []
    for key in sorted(set(keys)):
        members = [i for i in range(2 * rank) if keys[i] == key]
        runs.append(Run(*key, members, [inputs if i < rank else outputs for i in members]))
    for layer, chunk in enumerate(chunks):
        stack = stack if layer == 0 else Stack(chunk)
        for run in runs:
            run.read(stack, layer, layers)
        assert stack.empty
    decoded = {i: [step * 2 ** (-gains[i % rank] / 8) * x for x in row] for run in runs for i, row in run.expected()}
    return [[decoded[i] for i in range(rank)], [decoded[rank + i] for i in range(rank)]]


def layers_of(scale: int, layers: int) -> list[int]:
    return [min(max(layers - 3 - level, 0), layers - 1) for level in passes_of(scale)]


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
        self.done, self.plane, self.pending = 0, -1, False
        self.width = sum(widths)
        self.values = [0] * self.width

    def read(self, stack: Stack, layer: int, layers: int) -> None:
        end = sum(each <= layer for each in layers_of(self.scale, layers)) if layer >= self.start else 0
        first = max(0, (self.scale - 13) // 8)
        if self.done == 0 and end:
            self.done = end if end % 2 else end - 1
            self._first(stack, first - self.done // 2)
        while self.done < end:
            self.done += 1
            if self.done % 2 == 0:
                self._split(stack)
            else:
                self._bits(stack)

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
        found = self._expected() if self.done else [0.0] * self.width
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
