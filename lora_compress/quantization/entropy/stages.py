"""What each layer of a progressive payload tells: bit plane after bit plane, the same of all rows that have started."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .tables import MAX_SCALE

__all__ = ["LEAST_PLANES", "MOST_PLANES", "Layering", "Run", "least_scale", "lowest_symbol_plane", "row_runs"]

LEAST_PLANES, MOST_PLANES = 6, 16  # of a progressive payload, whose first stage tells all that is worth as much as the highest


class Layering(NamedTuple):
    """The layers of a payload.

    After each of them all rows that have started are known down to one bit plane: sign and magnitude >> plane. Zero has a sign too
    above plane 0, so that all cells are equally wide, which costs fewer bytes than a zero as wide as two cells. Each plane's
    first layer halves all cells; the others only hold components that start there.

    Args:
        layers: number of layers.
        per_plane: how many of them a bit plane has.
    """

    layers: int = 1
    per_plane: int = 1

    def plane(self, layer: int) -> int:
        """Down to which the rows that have started are known after a layer."""
        return (self.layers - 1 - layer) // self.per_plane

    def slope(self, layer: int) -> float:
        """log2 of the least fall of squared error, in squared steps per bit, that is told in a layer: that of halving.

        Halving cells of width 2 w lowers the squared error of a weight from w^2 / 3 to w^2 / 12, for a bit.
        """
        return 2 * (self.layers - layer) / self.per_plane - 4


def least_scale(plane: int) -> int:
    """Of a row that starts at a plane: sigma is then 1/8 of a cell or more."""
    return 8 * plane + 1


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
