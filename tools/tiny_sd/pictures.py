"""Turns drawings into the tensors that the stages train on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lora_compress.evaluation.shapes import Drawing, render, sample_drawing

__all__ = ["draw_pictures", "sample_drawings", "to_unit"]


def sample_drawings(count: int, generator: np.random.Generator, texture: str | None = "plain") -> list[Drawing]:
    """`count` random drawings; texture None: any."""
    return [sample_drawing(generator, texture=texture) for _ in range(count)]


def draw_pictures(drawings: Sequence[Drawing]) -> torch.Tensor:
    """Render drawings: (N, 3, 64, 64) uint8."""
    return torch.from_numpy(np.stack([render(drawing) for drawing in drawings])).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as floats in [0, 1]."""
    return pictures.float() / 255
