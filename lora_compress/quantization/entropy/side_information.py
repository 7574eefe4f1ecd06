"""What is coded of a module's components before their values: gains, scales and shapes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...errors import FormatError
from .ans import AnsReader, AnsWriter, uniform
from .integers import QuantizedModule
from .symbols import as_symbols, as_values, read_symbols, symbol_table, write_symbols
from .table_choice import LARGEST_SCALE
from .tables import MAX_SCALE, SHAPES

__all__ = ["Side", "SideReader", "write_side"]

_MODELS = 256  # numbers of (scale, shape) pairs
_MAX_EXPONENT = 4000  # eighths of an octave; sqrt of what float32 holds, twice over


class Side(NamedTuple):
    """What the decoder knows of p components.

    Args:
        gains: (p,).
        scales: (2, p), of their rows of down and of up.
        shapes: (2, p), likewise.
    """

    gains: np.ndarray
    scales: np.ndarray
    shapes: np.ndarray


def write_side(writer: AnsWriter, module: QuantizedModule, begin: int, end: int) -> None:
    """Code components begin to end of a module; with the first of them go the tables that code all."""
    if begin == end:
        return
    rows, scales, shapes = module.side
    offsets = rows[1].reshape(2, -1)
    coded = rows[0][begin:end], offsets[:, begin + 1 if begin else 0 : end + 1], rows[2].reshape(2, -1)[:, begin:end]
    for row, scale, shape in zip(coded, scales, shapes, strict=True):
        if begin == 0:
            writer.write(np.array([SHAPES * scale + shape]), uniform, _MODELS)
        write_symbols(writer, as_symbols(row.ravel()), symbol_table(scale, shape))


class SideReader:
    """Undoes `write_side`, call by call."""

    def __init__(self) -> None:
        self._gains, self._offsets, self._shapes = ([np.zeros((rows, 0), dtype=np.int64)] for rows in (1, 2, 2))
        self._models: list[tuple[int, int]] = []

    def read(self, reader: AnsReader, count: int) -> None:
        """Read the next `count` components."""
        if not count:
            return
        first = not self._models
        for number, (rows, width) in enumerate(((self._gains, count), (self._offsets, count + first), (self._shapes, count))):
            if first:
                self._models.append(_read_model(reader))
            symbols = read_symbols(reader, len(rows[0]) * width, symbol_table(*self._models[number]))
            rows.append(as_values(symbols).astype(np.int64).reshape(-1, width))

    def side(self, least_scale: np.ndarray | int = 1) -> Side:
        """Return what was read of all components.

        Args:
            least_scale: (p,) or one for all, the smallest scale that a row may have.

        Raises:
            FormatError: no writer codes that.
        """
        differences, offsets, kinds = (np.concatenate(rows, axis=1) for rows in (self._gains, self._offsets, self._shapes))
        gains = np.cumsum(differences)
        side = Side(gains, offsets[:, :1] + offsets[:, 1:] + 2 * gains, as_symbols(kinds))
        strange = (
            np.abs(side.gains) > _MAX_EXPONENT,
            side.scales < least_scale,
            side.scales > LARGEST_SCALE,
            side.shapes >= SHAPES,
        )
        if any(each.any() for each in strange):
            raise FormatError("an entropy-coded payload describes rows that cannot be: get the file again")
        return side


def _read_model(reader: AnsReader) -> tuple[int, int]:
    scale, shape = divmod(int(reader.read(1, uniform, _MODELS)[0]), SHAPES)
    if not 1 <= scale <= MAX_SCALE:
        raise FormatError(f"an entropy-coded payload names table {scale}, 1 to {MAX_SCALE} exist: get the file again")
    return scale, shape
