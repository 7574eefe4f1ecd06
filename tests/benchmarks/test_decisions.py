"""The controller in simulated trainings whose truth is known: it is seldom wrong, and not for want of deciding."""

from __future__ import annotations

import decisions
import pytest
import torch

from lora_compress.evaluation.frechet import frechet_distance

WIDTH, REPEATS = 16, 16  # narrow features and few repeats: seconds instead of minutes


@pytest.mark.parametrize("mode", decisions.TRUTHS)
@pytest.mark.parametrize(("count", "alike"), [(8, 0.0), (24, 0.9), (64, 0.0), (256, 0.9)])
def test_decisions_are_seldom_wrong(mode: str, count: int, alike: float) -> None:
    """At most 5 % are wrong. Of 16 trainings that is at most 3 with a probability of 99.3 %."""
    cells = decisions.line_of(decisions.Simulation(count, WIDTH), mode, alike, REPEATS)
    assert all(cell["wrong"] <= 3 / REPEATS for cell in cells)


def test_clear_trends_of_alike_pictures_are_followed() -> None:
    cells = decisions.line_of(decisions.Simulation(24, decisions.WIDTH), "fid_trend", 0.9, 6)
    assert cells[0]["decided"] == 1.0 and cells[2]["decided"] == 1.0
    assert "| 24 | 0.9 | 100%, 0.0% | 0.0% | 100%, 0.0% |" in decisions.table("fid_trend", [(0.9, 24, cells)])


def test_the_simulated_truth_is_true() -> None:
    """With many pictures the metric grows by as many floors as was asked for."""
    simulation = decisions.Simulation(64, WIDTH)
    simulation.count = 4000
    history = simulation.history("fid_trend", 1.0, 0.0, 0)
    steps = [(history[place + 1]["simulated_fd"] - history[place]["simulated_fd"]) / simulation.floor for place in (0, 1)]
    assert steps == pytest.approx([1.0, 1.0], rel=0.5)
    random = torch.Generator().manual_seed(1)
    assert simulation.floor == pytest.approx(
        frechet_distance(simulation.sample(64, random), simulation.sample(64, random)), rel=0.5
    )
