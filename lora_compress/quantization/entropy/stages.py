"""The stages of a progressive payload: which bit plane each ends at, and in which of them each component starts."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .integers import QuantizedModule
from .reconstruction import expected_values
from .symbols import symbol_table
from .tables import PRECISION, signed_counts
from .values import lowest_symbol_plane

__all__ = ["LEAST_PLANES", "MOST_PLANES", "SINGLE", "Stages", "least_scale", "start_stages"]

LEAST_PLANES, MOST_PLANES = (
    6,
    16,
)  # of a progressive payload, whose first stage holds all that is worth as much as its highest plane
_SIDE_BITS = 8.0  # of a component, about: what is coded before its values
_STEEPNESS = 0.5  # of halving cells, at which a component starts: cuts of files cost least around it


class Stages(NamedTuple):
    """The stages of a payload.

    After each of them all rows that have started are known down to one bit plane: sign and magnitude >> plane. Above plane 0 zero
    has a sign too, so that all cells are equally wide, which costs fewer bytes than a zero as wide as two cells. The first stage of
    each plane halves all cells; in the others rows start, and nothing else is coded.

    Args:
        number: of stages.
        per_plane: how many of them a bit plane has.
    """

    number: int = 1
    per_plane: int = 1

    def plane(self, stage: int) -> int:
        """Return the plane down to which the rows that have started are known after a stage."""
        return (self.number - 1 - stage) // self.per_plane

    def slope(self, stage: int) -> float:
        """Return log2 of the least fall of squared error, in squared step sizes per bit, in a stage: that of halving cells.

        Halving cells of width 2 w lowers the squared error of a weight from w^2 / 3 to w^2 / 12, for a bit.
        """
        return 2 * (self.number - stage) / self.per_plane - 4


SINGLE = Stages()


def least_scale(plane: int) -> int:
    """Return the smallest scale that a row may have in order to start at a plane: sigma is then 1/8 of a cell or more."""
    return 8 * plane + 1


def start_stages(module: QuantizedModule, stages: Stages) -> np.ndarray:
    """Return the stage in which each component starts, (rank,).

    It is the first one where coding the component lowers the error per bit at least as much as halving the cells of those that have
    started. The gain is its energy times the shares of the energy that its two rows then have: half of each is a quarter. So
    components start late, and at once in some detail.
    """
    if not module.rank:
        return np.zeros(0, dtype=np.int64)
    numbers = range(stages.number)
    planes = tuple(map(stages.plane, numbers))
    bits = np.full((module.rank, 1), _SIDE_BITS)
    shares, energies = [], []
    for values, scales, shapes in zip(module.values, module.scales, module.shapes, strict=True):
        table = np.array([_prefixes(*model, planes) for model in zip(scales.tolist(), shapes.tolist(), strict=True)])
        width = values.shape[1]
        energy = np.einsum("ij,ij->i", values, values, dtype=np.float64)[:, None]
        bits = bits + width * table[:, 0]
        shares.append(np.minimum(width * table[:, 1] / energy, 1))
        energies.append(energy)
    fall = np.sqrt(energies[0] * energies[1]) * shares[0] * shares[1]
    worth = fall >= bits * _STEEPNESS * np.exp2([stages.slope(stage) for stage in numbers])
    worth[:, -1] = True
    return worth.argmax(axis=1)


@lru_cache(maxsize=4096)
def _prefixes(scale: int, shape: int, planes: tuple[int, ...]) -> np.ndarray:
    """Of a row that starts at each plane: bits per weight, and the mean square of the weights then, in step sizes, (2, planes)."""
    return np.array([_prefix(scale, shape, plane) for plane in planes]).T


@lru_cache(maxsize=4096)
def _prefix(scale: int, shape: int, plane: int) -> tuple[float, float]:
    """Bits per weight, and the mean square of the weights, at one plane; 0 and 0 where a row cannot start."""
    if scale < least_scale(plane):
        return 0.0, 0.0
    coded = max(plane, lowest_symbol_plane(scale))
    counts_of, *key = (signed_counts, scale - 8 * coded, shape, coded) if coded else symbol_table(scale, shape)
    share = counts_of(*key) / (1 << PRECISION)
    centres = expected_values(np.arange(len(share)), scale, shape, coded)
    return float(-(share * np.log2(share)).sum()) + coded - plane, float((share * centres**2).sum())
