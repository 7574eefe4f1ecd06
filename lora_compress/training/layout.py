"""Which buffers the state of a session has, and their shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..quantization import FakeQuantizer
from ..settings import CompressionSettings
from .calibration import calibration_layout
from .pairs import Pair

__all__ = ["state_layout"]


def state_layout(
    pairs: Mapping[str, Pair], settings: CompressionSettings, grid: FakeQuantizer | None
) -> dict[str, tuple[torch.dtype, Mapping[str, tuple[int, ...]]]]:
    """dtype and shapes by buffer, for `TrainingState`; only what the settings need.

    kept: components that are not masked. sensitivity: its two averages. gram: E[(down x)(down x)^T], and the batches it is of.
    down_grid, up_grid: parameters of the quantizer. samples, squares, batches: of a calibration.
    """
    training, ranks = settings.training, {name: pair.rank for name, pair in pairs.items()}
    layout: dict[str, tuple[torch.dtype, Mapping[str, tuple[int, ...]]]] = {}
    if training.iterative_pruning or grid is not None:
        layout["kept"] = torch.bool, {name: (rank,) for name, rank in ranks.items()}
    if training.iterative_pruning:
        if training.importance == "sensitivity":
            layout["sensitivity"] = torch.float32, {name: (2, rank) for name, rank in ranks.items()}
        if training.importance == "activation":
            layout["gram"] = torch.float32, {name: (rank, rank) for name, rank in ranks.items()}
            layout["gram_count"] = torch.float32, dict.fromkeys(ranks, (1,))
    if training.collect_calibration:
        layout |= calibration_layout(pairs)
    if grid is not None:
        for side, kind in enumerate(("down_grid", "up_grid")):
            sizes = {name: grid.width(pair.row_sizes[side]) for name, pair in pairs.items()}
            layout[kind] = torch.float32, {name: (ranks[name], size) for name, size in sizes.items()}
    return layout
