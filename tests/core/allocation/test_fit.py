"""The search for a quantization step on functions that behave like sizes and errors, and on some that do not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_compress import SettingsError
from lora_compress.allocation import fit_step


class Counted:
    def __init__(self, function) -> None:
        self.function, self.steps = function, []

    def __call__(self, step: float) -> float:
        self.steps.append(step)
        return self.function(step)


SIGMAS = torch.exp(-0.15 * torch.arange(64, dtype=torch.float64)).repeat(20) * torch.linspace(0.1, 3, 20).repeat_interleave(64)


def entropy_bytes(step: float) -> float:
    """Size of coding every component with this step: Shannon's rate, and a header."""
    return float(640 / 8 * torch.log2(1 + SIGMAS / step).sum()) // 1 + 500


def coding_error(step: float) -> float:
    return float(torch.minimum(SIGMAS.square(), torch.tensor(step**2 / 12)).sum() / SIGMAS.square().sum()) ** 0.5


@pytest.mark.parametrize("start", [1e-6, 0.01, 1.0, 1e4])
@pytest.mark.parametrize("budget", [2_000, 50_000, 200_000, 800_000])
def test_a_size_is_met_in_few_evaluations(start: float, budget: float) -> None:
    evaluate = Counted(entropy_bytes)
    fit = fit_step(evaluate, budget, start=start, rising=False)
    assert 0.99 * budget <= fit.value <= budget
    assert fit.value == entropy_bytes(fit.step)
    assert fit.evaluations == len(evaluate.steps) <= 14


@pytest.mark.parametrize("start", [1e-6, 0.01, 1.0, 1e4])
@pytest.mark.parametrize("budget", [0.001, 0.05, 0.3, 0.9])
def test_an_error_is_met_in_few_evaluations(start: float, budget: float) -> None:
    evaluate = Counted(coding_error)
    fit = fit_step(evaluate, budget, start=start, rising=True)
    assert 0.99 * budget <= fit.value <= budget
    assert len(evaluate.steps) <= 14


def test_a_good_start_and_an_estimate_save_evaluations() -> None:
    for budget in (20_000, 50_000, 200_000, 800_000):
        plain, helped = Counted(entropy_bytes), Counted(entropy_bytes)
        fit_step(plain, budget, start=1e-5, rising=False)
        fit = fit_step(helped, budget, start=1e-5, rising=False, estimate=lambda step: 0.8 * (entropy_bytes(1.1 * step) - 500))
        assert 0.99 * budget <= fit.value <= budget
        assert len(helped.steps) <= min(4, len(plain.steps) - 1)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-5, 5), st.floats(0.4, 8.0), st.floats(-5, 5), st.floats(-8, 8), st.booleans(), st.floats(0.0, 0.002), st.booleans()
)
def test_power_laws_with_a_wiggle(
    offset: float, slope: float, budget: float, start: float, rising: bool, wiggle: float, helped: bool
) -> None:
    def value(step: float) -> float:
        x = math.log(step)
        return math.exp(offset + (slope if rising else -slope) * x + wiggle * math.sin(1000 * x))

    budget, start = math.exp(budget), math.exp(start)
    fit = fit_step(value, budget, start=start, rising=rising, estimate=(lambda s: value(s) * 1.3) if helped else None)
    assert 0.99 * budget <= fit.value <= budget
    assert fit.evaluations <= 20


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-600, 600).map(lambda n: n / 100), min_size=1, max_size=6, unique=True),
    st.floats(-6, 6),
    st.booleans(),
    st.floats(0.5, 6.5),
)
def test_stairs_give_the_last_stair_that_fits(edges: list[float], start: float, rising: bool, budget: float) -> None:
    def stairs(step: float) -> float:
        x = math.log(step) if rising else -math.log(step)
        return 1.0 + sum(x > edge for edge in edges)

    arguments = {"start": math.exp(start), "rising": rising, "bounds": (1e-4, 1e4), "max_evaluations": 80}
    if budget < 1.0:
        with pytest.raises(SettingsError, match="cannot be met: the least that can be reached is 1"):
            fit_step(stairs, budget, **arguments)
        return
    fit = fit_step(stairs, budget, **arguments)
    assert fit.value == min(math.floor(budget), 1 + len(edges))
    assert stairs(fit.step) == fit.value


def test_values_beyond_floats_are_searched_past() -> None:
    fit = fit_step(lambda s: math.inf if s > 2 else 0.0 if s < 1 else s, 1.5, start=100.0, rising=True)
    assert 0.99 * 1.5 <= fit.value <= 1.5
    fit = fit_step(lambda s: math.inf if s > 2 else 0.0 if s < 1 else s, 1.5, start=1e-5, rising=True)
    assert 0.99 * 1.5 <= fit.value <= 1.5


def test_everything_fits_into_a_large_budget() -> None:
    fit = fit_step(entropy_bytes, 1e12, start=1.0, rising=False, bounds=(1e-6, 1e6))
    assert fit.step == pytest.approx(1e-6)
