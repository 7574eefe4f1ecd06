"""The probe: reads what real drawings show, blurred ones too, and its features tell drawings apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora_compress.evaluation.probe import HEADS, Probe, load_probe
from lora_compress.evaluation.shapes import render, sample_drawing


@pytest.fixture(scope="module")
def probe(tiny_sd: Path) -> Probe:
    return load_probe(tiny_sd)


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """256 fresh pictures of any texture (256, 3, 64, 64), and what they show."""
    generator = np.random.default_rng(4242)
    drawings = [sample_drawing(generator, texture=None) for _ in range(256)]
    pictures = torch.from_numpy(np.stack([render(drawing) for drawing in drawings])).permute(0, 3, 1, 2).float() / 255
    return pictures, {name: torch.tensor([classes.index(getattr(d, name)) for d in drawings]) for name, classes in HEADS.items()}


@pytest.mark.parametrize("blurred", [False, True])
def test_it_reads_what_fresh_pictures_show(probe, real, blurred):
    pictures, labels = real
    if blurred:
        pictures = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    read = probe.classify(pictures)
    for name in HEADS:
        assert (read[name] == labels[name]).float().mean() >= 0.98, name


def test_features_are_nearer_for_drawings_that_show_the_same(probe):
    def features(seed: int, shape: str) -> torch.Tensor:
        generator = np.random.default_rng(seed)
        pictures = [
            render(sample_drawing(generator, shape=shape, colour="red", background="white", size="large")) for _ in range(16)
        ]
        return probe.features(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255)  # (16, 128)

    stars, more_stars, rings = features(0, "star"), features(1, "star"), features(2, "ring")
    assert stars.shape == (16, Probe.feature_size)
    assert torch.cdist(stars, more_stars).mean() < torch.cdist(stars, rings).mean()


def test_its_file_is_small(tiny_sd):
    assert (tiny_sd / "probe.safetensors").stat().st_size <= 2**20


def test_wrong_input_is_refused(probe, tmp_path):
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\); the probe reads \(N, 3, 64, 64\)"):
        probe.classify(torch.zeros(2, 3, 32, 32))
    with pytest.raises(FileNotFoundError, match="train_tiny_sd"):
        load_probe(tmp_path)
