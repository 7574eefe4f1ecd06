"""A small picture classifier over the drawings of `shapes`: says what a picture shows, and serves as feature extractor."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from ..files.tensors import open_safetensors
from .shapes import BACKGROUNDS, COLOURS, SHAPES, TEXTURES

__all__ = ["HEADS", "Probe", "load_probe"]

# head -> what its classes mean, in order
HEADS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "texture": TEXTURES,
}


class Probe(nn.Module):
    """Four halving convolution levels, one feature layer, one linear head per attribute."""

    feature_size = 128

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for level in range(4):  # 64 -> 32 -> 16 -> 8 -> 4 pixels
            wider = width * min(2**level, 4)
            layers += [
                nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.ReLU(),
                nn.Conv2d(wider, wider, 3, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.ReLU(),
            ]
            channels = wider
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(channels * 4, self.feature_size))
        self.heads = nn.ModuleDict({name: nn.Linear(self.feature_size, len(classes)) for name, classes in HEADS.items()})

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The penultimate layer: images (N, 3, 64, 64) in [0, 1] -> (N, 128), not negative."""
        if images.ndim != 4 or images.shape[1:] != (3, 64, 64):
            raise ValueError(f"images have shape {tuple(images.shape)}; the probe reads (N, 3, 64, 64)")
        return self.trunk(images * 2 - 1).relu()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images (N, 3, 64, 64) in [0, 1] -> logits (N, classes) per head."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images (N, 3, 64, 64) in [0, 1] -> for each head the class it reads, (N,) int64 indices into HEADS[head]."""
        return {name: logits.argmax(dim=1) for name, logits in self(images).items()}


def load_probe(path: str | Path) -> Probe:
    """Load a trained probe for use, from its safetensors file or from a model folder that holds `probe.safetensors`."""
    path = Path(path)
    if path.is_dir():
        path = path / "probe.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no probe at {os.fspath(path)}; tools/train_tiny_sd.py makes assets/tiny-sd/probe.safetensors")
    probe = Probe()
    with closing(open_safetensors(path)) as file:
        tensors = {name: file.read(name) for name in file}
    probe.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()})
    return probe.eval().requires_grad_(False)
