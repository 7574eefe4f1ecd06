"""What is told of a module's components before their values: gains, scales and shapes, in the layer in which each starts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ...errors import FormatError
from .ans import AnsReader, AnsWriter, uniform
from .integers import QuantizedModule
from .passes import as_symbols, as_values, read_symbols, write_symbols
from .stages import Layering, least_scale
from .steps import symbol_table
from .table_choice import LARGEST_SCALE
from .tables import MAX_SCALE, SHAPES

__all__ = ["Side", "read_side", "write_side"]

_COUNTS = symbol_table(33, 0)  # of components that start: half of the time 0, 1 or 2
_MODELS = 256  # numbers of (scale, shape) pairs
_MAX_EXPONENT = 4000  # eighths of an octave; sqrt of what float32 holds, twice over


class Side(NamedTuple):
    """Of the components that have started.

    Args:
        gains: (p,).
        scales: (2, p), of their rows of down and of up.
        shapes: (2, p), likewise.
        starts: (p,), the layers in which they start, rising.
    """

    gains: np.ndarray
    scales: np.ndarray
    shapes: np.ndarray
    starts: np.ndarray


def write_side(writers: Sequence[AnsWriter], module: QuantizedModule, starts: np.ndarray) -> None:
    """Begin each layer with the number of components that start in it, which the last layer leaves out, and what they are.

    Args:
        writers: one for each layer.
        module: whose components are sorted by the layers in which they start.
        starts: (rank,), these layers.
    """
    rows, scales, shapes = module.side
    models = list(zip(scales, shapes, strict=True))
    offsets = rows[1].reshape(2, -1)
    edges = np.searchsorted(starts, np.arange(len(writers) + 1))
    for writer, (begin, end) in zip(writers, pairwise(edges.tolist()), strict=True):
        if writer is not writers[-1] and begin < module.rank:
            write_symbols(writer, np.array([end - begin]), _COUNTS)
        if begin == end:
            continue
        first = begin == 0
        told = rows[0][begin:end], offsets[:, 0 if first else begin + 1 : end + 1], rows[2].reshape(2, -1)[:, begin:end]
        for row, (scale, shape) in zip(told, models, strict=True):
            if first:
                writer.write(np.array([SHAPES * scale + shape]), uniform, _MODELS)
            write_symbols(writer, as_symbols(row.ravel()), symbol_table(scale, shape))


def read_side(readers: Sequence[AnsReader], rank: int, layering: Layering) -> Side:
    """Undo `write_side`, from the readers of the first of the layers.

    Raises:
        FormatError: what no writer tells.
    """
    gains, offsets, shapes = ([np.zeros((rows, 0), dtype=np.int64)] for rows in (1, 2, 2))
    models: list[tuple[int, int]] = []
    starts: list[int] = []
    for layer, reader in enumerate(readers):
        left = rank - len(starts)
        count = left if layer == layering.layers - 1 or not left else int(read_symbols(reader, 1, _COUNTS)[0])
        if count > left:
            raise FormatError("an entropy-coded payload tells of more components than there are: get the file again")
        if not count:
            continue
        for number, (rows, width) in enumerate(((gains, count), (offsets, count + (not starts)), (shapes, count))):
            if not starts:
                models.append(_read_model(reader))
            symbols = read_symbols(reader, len(rows[0]) * width, symbol_table(*models[number]))
            rows.append(as_values(symbols).astype(np.int64).reshape(-1, width))
        starts += [layer] * count
    differences, told, kinds = (np.concatenate(rows, axis=1) for rows in (gains, offsets, shapes))
    exponents = np.cumsum(differences)
    side = Side(exponents, told[:, :1] + told[:, 1:] + 2 * exponents, as_symbols(kinds), np.array(starts, dtype=np.int64))
    _check(side, layering)
    return side


def _read_model(reader: AnsReader) -> tuple[int, int]:
    scale, shape = divmod(int(reader.read(1, uniform, _MODELS)[0]), SHAPES)
    if not 1 <= scale <= MAX_SCALE:
        raise FormatError(f"an entropy-coded payload names table {scale}, 1 to {MAX_SCALE} exist: get the file again")
    return scale, shape


def _check(side: Side, layering: Layering) -> None:
    least = np.array([least_scale(layering.plane(layer)) for layer in side.starts.tolist()])
    impossible = np.abs(side.gains) > _MAX_EXPONENT, side.scales < least, side.scales > LARGEST_SCALE, side.shapes >= SHAPES
    if any(each.any() for each in impossible):
        raise FormatError("an entropy-coded payload describes rows that cannot be: get the file again")
