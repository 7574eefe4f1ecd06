"""Which bit planes of a row each layer of a progressive payload holds: steepest fall of the error per bit first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .tables import MAX_SCALE, SHAPES

__all__ = ["Run", "Stage", "lowest_symbol_plane", "row_runs", "stage_at", "stages_of"]

_START = 13  # least scale (sigma = 0.35 steps of its plane) at which a row is coded at all, unless it is the last plane


class Stage(NamedTuple):
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


@dataclass(frozen=True)
class Run:
    """Rows of one scale and shape that start in one layer: they share tables and passes, and are coded as one long row.

    Args:
        scale: of the rows.
        shape: of the rows.
        ends: passes that layers 0, 1, ... have made, one number a layer.
        rows: (q,), their numbers, rising; up's follow down's.
    """

    scale: int
    shape: int
    ends: tuple[int, ...]
    rows: np.ndarray


def row_runs(scales: np.ndarray, shapes: np.ndarray, layers: int) -> list[Run]:
    """The runs of a module: by scale, then by shape, then by the layer in which they start.

    A component's two rows start in the same layer, as one without the other is worth nothing.

    Args:
        scales: (2 r,), of the rows of down, then of up.
        shapes: (2 r,), likewise.
        layers: number of layers.
    """
    keys = (scales * SHAPES + shapes) * layers
    if layers > 1:  # otherwise all start in the only one
        first = np.array([_pass_layers(scale, layers)[0] for scale in scales.tolist()], dtype=np.int64).reshape(2, -1)
        keys += np.tile(first.max(axis=0), 2)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    changes = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist(), len(keys)]
    runs = []
    for (begin, end), key in zip(pairwise(changes), keys[changes[:-1]].tolist(), strict=True):
        model, start = divmod(key, layers)
        scale, shape = divmod(model, SHAPES)
        runs.append(Run(scale, shape, _ends(scale, start, layers), order[begin:end]))
    return runs


def stages_of(runs: Sequence[Run], depth: int) -> list[Stage]:
    """What is known of each row after `depth` layers; at any stage, where nothing is known, a row is zero."""
    stages = [Stage(0)] * sum(len(run.rows) for run in runs)
    for run in runs if depth < len(runs[0].ends) else ():  # after the last layer nothing is left to tell
        if position := run.ends[depth - 1]:
            stage = stage_at(run.scale, position)
            for row in run.rows.tolist():
                stages[row] = stage
    return stages


@lru_cache(maxsize=4096)
def _ends(scale: int, start: int, layers: int) -> tuple[int, ...]:
    passes = _pass_layers(scale, layers)
    return tuple(sum(each <= layer for each in passes) if layer >= start else 0 for layer in range(layers))


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
