"""The entropy payload read by docs/format_entropy.md alone, in plain Python: it shares no code with the package."""

from __future__ import annotations

from tests.core.quantization.reference_tables import base, bit, centre, split, uniform

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
    rows = []
    for factor, width in enumerate((inputs, outputs)):
        for i in range(rank):
            offset = side[1][factor * (rank + 1)] + side[1][factor * (rank + 1) + 1 + i]
            shape = side[2][factor * rank + i]
            rows.append(Row(offset + 2 * gains[i], 2 * shape - 1 if shape > 0 else -2 * shape, width))
    for i in range(rank):
        start = max(rows[i].layers(layers)[0], rows[rank + i].layers(layers)[0])
        rows[i].start = rows[rank + i].start = start
    for layer, chunk in enumerate(chunks):
        stack = stack if layer == 0 else Stack(chunk)
        for row in rows:
            row.read(stack, layer, layers)
        assert stack.empty
    decoded = [[step * 2 ** (-gains[i % rank] / 8) * x for x in row.expected()] for i, row in enumerate(rows)]
    return [decoded[:rank], decoded[rank:]]


class Row:
    """One row of a factor: values as (magnitude, sign), whose unit is 2^plane; `pending`: magnitudes above 1 lack a bit."""

    def __init__(self, scale: int, shape: int, width: int) -> None:
        self.scale, self.shape, self.width = scale, shape, width
        self.done, self.start, self.plane, self.pending = 0, 0, -1, False
        self.values = [0] * width

    def layers(self, layers: int) -> list[int]:
        return [min(max(layers - 3 - level, 0), layers - 1) for level in passes_of(self.scale)]

    def read(self, stack: Stack, layer: int, layers: int) -> None:
        end = sum(each <= layer for each in self.layers(layers)) if layer >= self.start else 0
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
        self.values = [2 * v if v else value(stack.read(counts)) for v in self.values]

    def _bits(self, stack: Stack) -> None:
        scale = self.scale - 8 * self.plane
        contexts = 3 if scale <= 40 else 1
        for context in range(1, contexts + 1):
            for i, v in enumerate(self.values):
                parent = abs(v) // 2
                if parent and min(parent, contexts) == context:
                    low = stack.read(bit(scale, self.shape, self.plane, context))
                    self.values[i] += low if v > 0 else -low
        self.pending = False

    def expected(self) -> list[float]:
        if not self.done:
            return [0.0] * self.width
        result = []
        for v in self.values:
            wide = int(self.pending and abs(v) > 1)
            cell = abs(v) >> wide
            distance = centre(self.scale - 8 * self.plane, self.shape, self.plane, wide, cell) * 2**self.plane
            result.append(distance if v > 0 else -distance if v else 0.0)
        return result
