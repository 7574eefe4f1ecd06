"""The layer of a progressive payload in which each component starts: where what it then tells is worth its bits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .integers import QuantizedModule
from .reconstruction import expected_values
from .stages import Layering, least_scale, lowest_symbol_plane
from .steps import symbol_table
from .tables import PRECISION, signed_counts

__all__ = ["start_layers"]

_SIDE_BITS = 8.0  # of a component, about: what is told before its values
_STEEPNESS = 0.5  # of halving cells, at which a component starts: cuts of files cost least around it


def start_layers(module: QuantizedModule, layering: Layering) -> np.ndarray:
    """Layers (rank,): each component starts in the first one where what is then told of it lowers the error as steeply as passes.

    By as much as its energy times the shares of it that its two rows then have: half of each is a quarter. So components start
    late, and at once in some detail.
    """
    if layering.layers == 1 or not module.rank:
        return np.zeros(module.rank, dtype=np.int64)
    layers = range(layering.layers)
    planes = tuple(map(layering.plane, layers))
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
    worth = fall >= bits * _STEEPNESS * np.exp2([layering.slope(layer) for layer in layers])
    worth[:, -1] = True
    return worth.argmax(axis=1)


@lru_cache(maxsize=4096)
def _prefixes(scale: int, shape: int, planes: tuple[int, ...]) -> np.ndarray:
    """Of a row that starts at each plane: bits per weight, and the mean square of the weights then, in steps, (2, planes)."""
    return np.array([_prefix(scale, shape, plane) for plane in planes]).T


@lru_cache(maxsize=4096)
def _prefix(scale: int, shape: int, plane: int) -> tuple[float, float]:
    """Bits per weight, and the mean square of the weights, at one plane; nothing where a row cannot start."""
    if scale < least_scale(plane):
        return 0.0, 0.0
    told = max(plane, lowest_symbol_plane(scale))
    counts_of, *key = (signed_counts, scale - 8 * told, shape, told) if told else symbol_table(scale, shape)
    share = counts_of(*key) / (1 << PRECISION)
    centres = expected_values(np.arange(len(share)), scale, shape, told)
    return float(-(share * np.log2(share)).sum()) + told - plane, float((share * centres**2).sum())
