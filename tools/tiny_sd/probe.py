"""Stage: the probe, taught on pictures that are blurred and noised a little, as an autoencoder's are."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from lora_compress.evaluation.probe import HEADS, Probe

from .loop import adamw, numpy_generator, run_steps, torch_generator
from .pictures import draw_pictures, sample_drawings, to_unit

__all__ = ["label_drawings", "train_probe"]

_STREAM = 1  # of the seed
_PICTURES = 12000


def label_drawings(drawings: list) -> dict[str, torch.Tensor]:
    """What the probe should read: for each head (N,) int64 class indices."""
    return {name: torch.tensor([classes.index(getattr(drawing, name)) for drawing in drawings]) for name, classes in HEADS.items()}


def train_probe(work: Path, seed: int, steps: int, batch: int = 64) -> Probe:
    """Train every head at once on all textures; cross-entropy, the four added."""
    torch.manual_seed(seed)
    probe = Probe()
    drawings = sample_drawings(_PICTURES, numpy_generator(seed, _STREAM), texture=None)
    pictures, labels = draw_pictures(drawings), label_drawings(drawings)
    optimizer = adamw(probe, lr=2e-3)

    def take_step(step: int) -> float:
        generator = torch_generator(seed, _STREAM, step)
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        logits = probe(_degrade(to_unit(pictures[chosen]), generator))
        loss = torch.stack([F.cross_entropy(logits[name], labels[name][chosen], label_smoothing=0.02) for name in HEADS]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    run_steps("probe", steps, take_step, {"probe": probe}, optimizer, work)
    return probe.eval()


def _degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blend each picture with its blurred self, shift its brightness and colours a little and add noise of up to 0.08."""
    one = (len(images), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(one, generator=generator)
    images = images + share * (blurred - images)
    tint = 0.04 * torch.randn((len(images), 3, 1, 1), generator=generator)
    noise = 0.08 * torch.rand(one, generator=generator) * torch.randn(images.shape, generator=generator)
    return (images + tint + noise).clamp(0, 1)
