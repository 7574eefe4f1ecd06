"""The restartable training loop that every stage runs in."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

__all__ = ["adamw", "learning_rate_factor", "numpy_generator", "run_steps", "torch_generator"]

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """What a checkpoint can hold: modules, optimizers, averages."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def numpy_generator(seed: int, *stream: int) -> np.random.Generator:
    """A generator for one stage or step: the same numbers whether or not training was interrupted before."""
    return np.random.default_rng([seed, *stream])


def torch_generator(seed: int, *stream: int) -> torch.Generator:
    """The torch twin of `numpy_generator`."""
    return torch.Generator().manual_seed(int(numpy_generator(seed, *stream).integers(2**62)))


def adamw(*modules: torch.nn.Module, lr: float, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only: neither biases and norms nor embeddings of words that never occur."""
    decayed, others = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            (decayed if parameter.ndim > 1 and "embedding" not in name else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to zero; 1.0 at the peak."""
    progress = (step - warmup) / max(1, steps - warmup)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress)))


def run_steps(
    name: str,
    steps: int,
    take_step: Callable[[int], float],
    state: Mapping[str, Stateful],
    optimizer: torch.optim.Optimizer,
    work: Path,
    save_every: int = 250,
) -> None:
    """Run take_step(step) -> loss from the last checkpoint on, with the learning rate scheduled and all saved now and then."""
    path = work / f"{name}.pt"
    everything = {**state, "optimizer": optimizer}
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved.pop("step")
        for key, part in everything.items():
            part.load_state_dict(saved[key])
        logger.info("%s: goes on at step %d of %d", name, start, steps)
    peaks = [group.setdefault("peak_lr", group["lr"]) for group in optimizer.param_groups]
    begun, running = time.monotonic(), 0.0
    for step in range(start, steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate_factor(step, steps)
        running += take_step(step)
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - begun) / (step + 1 - start)
            left = pace * (steps - step - 1) / 60
            logger.info("%s: step %d of %d, loss %.5f, %.2f s/step, %.1f min left", name, step + 1, steps, running / 50, pace, left)
            running = 0.0
        if (step + 1) % save_every == 0 or step + 1 == steps:
            torch.save(
                {"step": step + 1, **{key: part.state_dict() for key, part in everything.items()}}, path.with_suffix(".part")
            )
            os.replace(path.with_suffix(".part"), path)
