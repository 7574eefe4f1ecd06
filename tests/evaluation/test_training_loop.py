"""The loop that tools/train_tiny_sd.py trains in: an interruption changes nothing."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_sd.loop import adamw, learning_rate_factor, run_steps, torch_generator
from tiny_sd.unet import Average


def _train(work: Path, steps: int, stop_at: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a line for `steps`; with stop_at, as if the power went off there. Returns the weight and its average."""
    work.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    average = Average(model)
    optimizer = adamw(model, lr=1e-2)

    def take_step(step: int) -> float:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch_generator(0, 9, step))
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step)
        return float(loss.detach())

    run_steps("line", steps, take_step, {"model": model, "average": average}, optimizer, work, save_every=10)
    return model.weight.detach().clone(), average.module.weight.detach().clone()


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    straight = _train(tmp_path / "straight", 40)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "broken", 40, stop_at=27)
    resumed = _train(tmp_path / "broken", 40)
    assert torch.equal(resumed[0], straight[0])
    assert torch.equal(resumed[1], straight[1])


def test_the_learning_rate_rises_then_falls_to_nothing():
    factors = [learning_rate_factor(step, 1000, warmup=100) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert max(factors) == pytest.approx(factors[100]) == pytest.approx(1.0)
    assert all(later <= earlier for earlier, later in pairwise(factors[100:]))
    assert factors[-1] < 1e-4
