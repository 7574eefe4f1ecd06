"""Run by torchrun or alone: train with noise and timesteps that are those of the whole batch, of which a process takes its part."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from library.compress_torchvision import declare_missing_operators

declare_missing_operators()

from consumers.test_diffusers_training import _config  # noqa: E402

from lora_compress.trainer import denoising, training  # noqa: E402

_WHOLE = 4  # of all processes


def main(folder: Path, batch: int) -> None:
    """As many processes as make four pictures a step."""
    rank = int(os.environ.get("RANK", "0"))
    own, steps = slice(rank * batch, (rank + 1) * batch), 0
    whole_loss, randint = denoising.Denoiser.loss, torch.randint

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn((_WHOLE, *like.shape[1:]), generator=torch.Generator().manual_seed(steps))[own]

    def times(high: int, *_: Any, **__: Any) -> torch.Tensor:
        return randint(high, (_WHOLE,), generator=torch.Generator().manual_seed(steps))[own]

    def loss(self: Any, latents: torch.Tensor, captions: list[str]) -> torch.Tensor:
        nonlocal steps
        steps += 1
        with mock.patch.object(torch, "randn_like", noise), mock.patch.object(torch, "randint", times):
            return whole_loss(self, latents, captions)

    denoising.Denoiser.loss = loss  # type: ignore[method-assign]
    pruning = {"iterative_pruning": True, "rank_ratio": 0.5}
    own_options = {"train_batch_size": batch, "output_name": f"batch{batch}", "save_precision": "float", "max_train_steps": 4}
    training.train({**_config(folder), "own": own_options, "pruning": pruning, "quantization": {"save_format": "kohya"}})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
