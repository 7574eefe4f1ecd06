"""Ranks for a budget: against every possible choice where that can be tried, and by their properties where not."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_compress import SettingsError
from lora_compress.allocation import ranks_for_error, ranks_for_size, truncation_points

Problem = tuple[dict[str, Tensor], dict[str, int], dict[str, int], dict[str, float], int]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    names = [f"m{index}" for index in range(draw(st.integers(1, 4)))]
    values = st.lists(st.integers(0, 30), min_size=1, max_size=4)
    sigmas = {name: torch.tensor(sorted(draw(values), reverse=True), dtype=torch.float64) for name in names}
    costs = {name: draw(st.integers(1, 9)) for name in names}
    fixed = {name: draw(st.integers(0, 12)) for name in names}
    weights = {name: draw(st.sampled_from([0.25, 1.0, 4.0])) for name in names}
    return sigmas, costs, fixed, weights, draw(st.integers(1, 2))


def bytes_of(problem: Problem, ranks: dict[str, int]) -> int:
    _, costs, fixed, _, stored = problem
    return sum(fixed[name] + costs[name] * max(rank, stored) for name, rank in ranks.items() if rank)


def kept(problem: Problem, ranks: dict[str, int]) -> float:
    sigmas, _, _, weights, _ = problem
    return sum(weights[name] * float(sigma[: ranks[name]].square().sum()) for name, sigma in sigmas.items())


def choices(problem: Problem) -> list[dict[str, int]]:
    names = list(problem[0])
    return [
        dict(zip(names, ranks, strict=True)) for ranks in itertools.product(*[range(len(problem[0][name]) + 1) for name in names])
    ]


def all_of(problem: Problem) -> float:
    return kept(problem, {name: len(sigma) for name, sigma in problem[0].items()})


@settings(max_examples=300, deadline=None)
@given(problems(), st.integers(0, 200))
def test_a_size_is_never_exceeded_and_nothing_useful_fits_any_more(problem: Problem, budget: int) -> None:
    sigmas, costs, fixed, weights, stored = problem
    ranks = ranks_for_size(sigmas, costs, fixed, budget, weights=weights, min_rank_stored=stored)
    assert bytes_of(problem, ranks) <= budget
    gained = kept(problem, ranks)
    for name, sigma in sigmas.items():
        if ranks[name] < len(sigma) and sigma[ranks[name]] > 0:
            assert bytes_of(problem, {**ranks, name: ranks[name] + 1}) > budget
    allowed = [choice for choice in choices(problem) if bytes_of(problem, choice) <= budget]
    best = max(kept(problem, choice) for choice in allowed)
    largest_step = max(weights[name] * float(sigma.square().sum()) for name, sigma in sigmas.items())
    assert best - largest_step <= gained <= best  # never more than one hull step from the best of all choices


@settings(max_examples=200, deadline=None)
@given(problems(), st.floats(0.01, 1.0))
def test_sizes_on_the_hull_are_met_with_the_best_of_all_choices(problem: Problem, slope: float) -> None:
    sigmas, costs, fixed, weights, stored = problem
    everything = [(kept(problem, choice), bytes_of(problem, choice)) for choice in choices(problem)]
    multiplier = slope * all_of(problem) / max(size for _, size in everything)
    _, size = max(everything, key=lambda pair: pair[0] - multiplier * pair[1])  # a vertex of the convex hull of all choices
    best = max(value for value, cost in everything if cost <= size)
    assert kept(problem, ranks_for_size(sigmas, costs, fixed, size, weights=weights, min_rank_stored=stored)) == pytest.approx(best)


@settings(max_examples=300, deadline=None)
@given(problems(), st.floats(0.001, 0.999))
def test_an_error_is_never_exceeded_and_no_component_could_go(problem: Problem, error: float) -> None:
    sigmas, costs, fixed, weights, stored = problem
    ranks = ranks_for_error(sigmas, costs, fixed, error, weights=weights, min_rank_stored=stored)
    allowed = error**2 * all_of(problem)

    def lost(each: dict[str, int]) -> float:
        return sum(weights[name] * float(sigma[each[name] :].square().sum()) for name, sigma in sigmas.items())

    assert lost(ranks) <= allowed
    size = bytes_of(problem, ranks)
    for name, rank in ranks.items():
        for fewer in {0, rank - 1} if rank else ():
            cheaper = {**ranks, name: fewer}
            if bytes_of(problem, cheaper) < size:
                assert lost(cheaper) > allowed * (1 - 1e-9)
    best = min(bytes_of(problem, choice) for choice in choices(problem) if lost(choice) <= allowed * (1 + 1e-12))
    largest_step = max(fixed[name] + costs[name] * max(len(sigma), stored) for name, sigma in sigmas.items())
    assert best <= size <= best + largest_step


@settings(max_examples=150, deadline=None)
@given(problems(), st.floats(0.05, 0.9), st.floats(0.05, 0.9), st.floats(0.0, 0.02))
def test_parts_and_the_whole_file_keep_to_their_errors(problem: Problem, part: float, whole: float, distortion: float) -> None:
    sigmas, costs, fixed, _, _ = problem
    parts = {name: "U-Net" if name in ("m0", "m2") else "text encoder" for name in sigmas}
    spoiled = 2 * distortion + distortion**2

    def relative(names: list[str]) -> float:
        norm = sum(float(sigmas[name].square().sum()) for name in names)
        lost = sum(float(sigmas[n][ranks[n] :].square().sum() + spoiled * sigmas[n][: ranks[n]].square().sum()) for n in names)
        return (lost / norm) ** 0.5 if norm else 0.0

    targets = {"part_errors": {"U-Net": part}, "parts": parts, "distortion": distortion}
    try:
        ranks = ranks_for_error(sigmas, costs, fixed, whole, **targets)
    except SettingsError:
        assert spoiled**0.5 >= min(part, whole) * (1 - 1e-9)
        return
    assert relative([name for name in sigmas if parts[name] == "U-Net"]) <= part
    assert relative(list(sigmas)) <= whole
    ranks = ranks_for_error(sigmas, costs, fixed, None, **targets)
    assert relative([name for name in sigmas if parts[name] == "U-Net"]) <= part
    assert all(ranks[name] == len(sigma) for name, sigma in sigmas.items() if parts[name] != "U-Net")


def test_floors_are_paid_first_and_refused_when_they_do_not_fit() -> None:
    sigmas = {"weak": torch.tensor([0.1, 0.1]), "strong": torch.tensor([9.0, 8.0, 7.0])}
    costs, fixed = {"weak": 5, "strong": 5}, {"weak": 1, "strong": 1}
    assert ranks_for_size(sigmas, costs, fixed, 11) == {"weak": 0, "strong": 2}
    assert ranks_for_size(sigmas, costs, fixed, 12, protected={"weak"}) == {"weak": 1, "strong": 1}
    assert ranks_for_size(sigmas, costs, fixed, 22, min_rank=2) == {"weak": 2, "strong": 2}
    assert ranks_for_error(sigmas, costs, fixed, 0.99, protected={"weak"})["weak"] == 1
    with pytest.raises(SettingsError, match="21 bytes are too few, the least that this format can do is 22 bytes"):
        ranks_for_size(sigmas, costs, fixed, 21, min_rank=2)
    with pytest.raises(SettingsError, match=r"target_error=0\.03 cannot be met: .*0\.0374"):
        ranks_for_error(sigmas, costs, fixed, 0.03, distortion=7e-4)


def sdxl_like() -> tuple[dict[str, Tensor], dict[str, int], dict[str, int]]:
    generator = np.random.default_rng(0)
    sigmas, costs = {}, {}
    for index in range(1014):
        decay, scale = generator.uniform(0.02, 0.3), generator.lognormal(0, 1)
        sigmas[f"m{index}"] = torch.from_numpy(scale * np.exp(-decay * np.arange(100)) * generator.uniform(0.9, 1, 100)).sort(
            descending=True
        )[0]
        costs[f"m{index}"] = 2 * int(generator.choice([1280 + 1280, 2048 + 1280, 1280 + 10240, 640 + 640]))
    return sigmas, costs, dict.fromkeys(sigmas, 300)


@pytest.mark.parametrize("target", [5_000_000, 20_000_000, 100_000_000])
def test_a_hundred_thousand_components_meet_a_size_within_a_percent(target: int) -> None:
    sigmas, costs, fixed = sdxl_like()
    start = time.perf_counter()
    ranks = ranks_for_size(sigmas, costs, fixed, target, min_rank_stored=2)
    assert time.perf_counter() - start < 5.0
    size = sum(300 + costs[name] * max(rank, 2) for name, rank in ranks.items() if rank)
    assert 0.99 * target <= size <= target


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01, 1e-4])
def test_a_hundred_thousand_components_meet_an_error(error: float) -> None:
    sigmas, costs, fixed = sdxl_like()
    ranks = ranks_for_error(sigmas, costs, fixed, error)
    lost = sum(float(sigma[ranks[name] :].square().sum()) for name, sigma in sigmas.items())
    reached = (lost / sum(float(sigma.square().sum()) for sigma in sigmas.values())) ** 0.5
    assert 0.999 * error <= reached <= error


@given(problems())
@settings(max_examples=100, deadline=None)
def test_the_points_of_truncation_are_missed_by_less_than_a_component(problem: Problem) -> None:
    sigmas, costs, _, _, least = problem
    total = sum(float(sigma.square().sum()) for sigma in sigmas.values())
    errors = [0.05, 0.3, 0.7]
    points = truncation_points([*sigmas.values()], [*costs.values()], errors, min_rank=least)
    assert len(points) == (len(errors) if total else 0)
    for error, (size, reached) in zip(errors, points, strict=False):
        best = ranks_for_error(sigmas, costs, dict.fromkeys(sigmas, 0), error, min_rank=least)
        assert reached <= error + 1e-12
        assert size < sum(costs[name] * rank for name, rank in best.items()) + max(costs.values())
