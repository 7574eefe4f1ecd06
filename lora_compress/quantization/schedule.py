"""What each layer of a progressive payload tells: bit plane after bit plane, the same of all rows that have started."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .tables import MAX_SCALE

__all__ = ["Layering", "Run", "Stage", "least_scale", "lowest_symbol_plane", "row_runs"]


class Stage(NamedTuple):
    """What is known of a row's values: sign and magnitude >> plane; if `halved`, a bit more of those that were zero before it.

    Values are then in units of 2^plane, and those of magnitude above 1 still lack their last bit: it is zero.
    """

    plane: int
    halved: bool = False

    @property
    def left(self) -> int:
        """Passes that are still to come: next bits at plane 0 are the last, before them zeros are split there, and so on up."""
        return 2 * self.plane + self.halved


class Layering(NamedTuple):
    """The layers of a payload.

    Halving a cell lowers the squared error four times as steeply per bit at each higher plane, most steeply that of zero. So in
    each plane the first layer tells what values are that were zero, the last one the next bits of the others; layers in between
    only hold components that start there.

    Args:
        layers: number of layers.
        per_plane: how many of them a bit plane has.
    """

    layers: int = 1
    per_plane: int = 2

    def stage(self, layer: int) -> Stage:
        """What is known, after a layer, of the rows that have started by then."""
        left = self.layers - 1 - layer
        return Stage(left // self.per_plane, left % self.per_plane > 0)

    def slope(self, layer: int) -> float:
        """log2 of the least fall of squared error, in squared steps per bit, that is told in a layer."""
        return 2 * (self.layers - 1 - layer) / self.per_plane - 2.4


def least_scale(stage: Stage) -> int:
    """Of a row that starts so that this is known of it: sigma is then 1/8 of a step or more where its first symbols are told."""
    return 8 * (stage.plane + stage.halved) + 1


def lowest_symbol_plane(scale: int) -> int:
    """The lowest plane at which a row's values are coded as whole symbols."""
    return max(0, -((MAX_SCALE - scale) // 8))


class Run(NamedTuple):
    """Rows of one scale and shape that start in one layer: they share tables and passes, and are coded as one long row.

    Args:
        scale: of the rows.
        shape: of the rows.
        start: the layer.
        rows: (q,), their numbers, rising; up's follow down's.
    """

    scale: int
    shape: int
    start: int
    rows: np.ndarray


def row_runs(scales: np.ndarray, shapes: np.ndarray, starts: np.ndarray) -> list[Run]:
    """The runs of a module: by scale, then by shape, then by the layer in which they start.

    Args:
        scales: (2, r), of the rows of down and of up.
        shapes: (2, r), likewise.
        starts: (r,), layers in which components start: one row without the other is worth nothing.
    """
    models = np.stack([scales, shapes, np.broadcast_to(starts, scales.shape)]).reshape(3, -1)
    order = np.lexsort(models[::-1])
    models = models[:, order]
    changes = [0, *((models[:, 1:] != models[:, :-1]).any(axis=0).nonzero()[0] + 1).tolist(), len(order)]
    runs = []
    for begin, end in pairwise(changes):
        scale, shape, start = models[:, begin].tolist()
        runs.append(Run(scale, shape, start, order[begin:end]))
    return runs
