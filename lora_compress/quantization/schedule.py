"""Which bit planes of a row each layer of a progressive payload holds: steepest fall of the error per bit first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .tables import MAX_SCALE

__all__ = ["Stage", "lowest_symbol_plane", "row_positions", "stage_at"]

_START = 13  # least scale (sigma = 0.35 steps of its plane) at which a row is coded at all, unless it is the last plane


@dataclass(frozen=True)
class Stage:
    """What is known of a row's values: sign and magnitude >> plane; if `halved`, a bit more of those that were zero before it.

    Values are then in units of 2^plane, and those of magnitude above 1 still lack their last bit: it is zero.
    """

    plane: int
    halved: bool = False


def start_plane(scale: int) -> int:
    """The plane at which a row of `scale` is coded first."""
    return max(0, (scale - _START) // 8)


def stage_at(scale: int, position: int) -> Stage:
    """What is known of a row after `position` passes, at least one."""
    return Stage(start_plane(scale) - position // 2, position % 2 == 0)


def lowest_symbol_plane(scale: int) -> int:
    """The lowest plane at which a row's values are coded as whole symbols."""
    return max(0, -((MAX_SCALE - scale) // 8))


def row_positions(down: np.ndarray, up: np.ndarray, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Passes of each row that layers 0, 1, ... have made, (layers, r), for the rows of both factors.

    A component's two rows start in the same layer, as one without the other is worth nothing.

    Args:
        down: (r,), scales of the rows of down.
        up: (r,), likewise.
        layers: number of layers.
    """
    starts = np.array(
        [max(_pass_layers(a, layers)[0], _pass_layers(b, layers)[0]) for a, b in zip(down.tolist(), up.tolist(), strict=True)],
        dtype=np.int64,
    )
    return _positions(down, starts, layers), _positions(up, starts, layers)


def _positions(scales: np.ndarray, starts: np.ndarray, layers: int) -> np.ndarray:
    table = np.zeros((layers, len(scales)), dtype=np.int64)
    for row, scale in enumerate(scales.tolist()):
        passes = _pass_layers(scale, layers)
        for layer in range(int(starts[row]), layers):
            table[layer, row] = sum(each <= layer for each in passes)
    return table


@lru_cache(maxsize=4096)
def _pass_layers(scale: int, layers: int) -> tuple[int, ...]:
    """The layer of each pass of a row: one layer for each halving of the fall of squared error per bit.

    Levels are floor(log2(fall / step^2) + 1/4) of a Gaussian, of the pass that finds new non-zero values and of the one that
    refines those known, at most the level of the pass before.
    """
    plane = start_plane(scale)
    levels = [2 * plane - (3 if scale - 8 * plane <= 17 else 2)]
    while plane:
        plane -= 1
        here = scale - 8 * plane
        levels.append(min(levels[-1], 2 * plane - (2 if here <= 23 else 1)))
        levels.append(min(levels[-1], 2 * plane - (4 if here <= 21 else 3 if here <= 29 else 2)))
    return tuple(min(max(layers - 3 - level, 0), layers - 1) for level in levels)
