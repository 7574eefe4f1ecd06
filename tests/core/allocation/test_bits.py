"""Rank and bits together: against every possible choice where that can be tried, and by their properties where not."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_compress import SettingsError
from lora_compress.allocation import bits_for_error, bits_for_size

DISTORTION = {2: 0.1175, 3: 0.03455, 4: 0.009501, 6: 0.000644, 8: 4.12e-5}  # Lloyd-Max on Gaussian data
Bits = dict[str, tuple[int, ...]]


def squared_error(sigmas: dict[str, Tensor], bits: Bits, distortion: dict[int, float]) -> float:
    lost = 0.0
    for name, sigma in sigmas.items():
        for index, value in enumerate(sigma.tolist()):
            d = distortion[bits[name][index]] if index < len(bits[name]) else None
            lost += value**2 * (1.0 if d is None else 2 * d + d * d)
    return lost


def bytes_of(widths: dict[str, int], overhead: dict[str, int], bits: Bits) -> int:
    return sum(overhead[name] * bool(each) + sum(-(-widths[name] * b // 8) for b in each) for name, each in bits.items())


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, int], dict[str, int], dict[int, float]]:
    names = [f"m{index}" for index in range(draw(st.integers(1, 3)))]
    values = st.lists(st.integers(0, 30), min_size=1, max_size=3)
    sigmas = {name: torch.tensor(sorted(draw(values), reverse=True), dtype=torch.float64) for name in names}
    widths = {name: draw(st.integers(2, 40)) for name in names}
    overhead = {name: draw(st.integers(0, 30)) for name in names}
    offered = draw(st.sets(st.sampled_from(sorted(DISTORTION)), min_size=1, max_size=3))
    return sigmas, widths, overhead, {b: DISTORTION[b] for b in offered}


def choices(sigmas: dict[str, Tensor], distortion: dict[int, float]) -> list[Bits]:
    ladders = [
        [each for k in range(len(sigma) + 1) for each in itertools.combinations_with_replacement(sorted(distortion)[::-1], k)]
        for sigma in sigmas.values()
    ]
    return [dict(zip(sigmas, each, strict=True)) for each in itertools.product(*ladders)]


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(0, 200))
def test_a_size_is_never_exceeded_and_no_choice_is_much_better(problem: tuple, budget: int) -> None:
    sigmas, widths, overhead, distortion = problem
    bits = bits_for_size(sigmas, widths, distortion, budget, overhead=overhead)
    assert bytes_of(widths, overhead, bits) <= budget
    for each in bits.values():
        assert all(a >= b for a, b in itertools.pairwise(each))
        assert set(each) <= set(distortion)
    lost = squared_error(sigmas, bits, distortion)
    best = min(
        squared_error(sigmas, each, distortion)
        for each in choices(sigmas, distortion)
        if bytes_of(widths, overhead, each) <= budget
    )
    largest_step = max(float(sigma.square().sum()) for sigma in sigmas.values())
    assert best * (1 - 1e-9) <= lost <= best + largest_step


@settings(max_examples=80, deadline=None)
@given(problems(), st.floats(0.001, 1.0))
def test_sizes_on_the_hull_are_met_with_the_best_of_all_choices(problem: tuple, slope: float) -> None:
    sigmas, widths, overhead, distortion = problem
    everything = [(squared_error(sigmas, c, distortion), bytes_of(widths, overhead, c)) for c in choices(sigmas, distortion)]
    multiplier = slope * max(error for error, _ in everything) / max(size for _, size in everything)
    _, size = min(everything, key=lambda pair: pair[0] + multiplier * pair[1])
    best = min(error for error, cost in everything if cost <= size)
    bits = bits_for_size(sigmas, widths, distortion, size, overhead=overhead)
    assert squared_error(sigmas, bits, distortion) == pytest.approx(best)


@settings(max_examples=80, deadline=None)
@given(problems(), st.floats(0.001, 0.999))
def test_an_error_is_never_exceeded(problem: tuple, error: float) -> None:
    sigmas, widths, overhead, distortion = problem
    norm = sum(float(sigma.square().sum()) for sigma in sigmas.values())
    best = min(distortion.values())
    if 2 * best + best**2 > error**2 and norm:
        with pytest.raises(SettingsError, match="cannot be met"):
            bits_for_error(sigmas, widths, distortion, error, overhead=overhead)
        return
    bits = bits_for_error(sigmas, widths, distortion, error, overhead=overhead)
    assert squared_error(sigmas, bits, distortion) <= error**2 * norm * (1 + 1e-12)
    cheapest = min(
        bytes_of(widths, overhead, each)
        for each in choices(sigmas, distortion)
        if squared_error(sigmas, each, distortion) <= error**2 * norm
    )
    largest_step = max(overhead[name] + len(sigma) * widths[name] for name, sigma in sigmas.items())
    assert cheapest <= bytes_of(widths, overhead, bits) <= cheapest + largest_step


def test_the_error_of_two_coded_factors_is_as_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.nn.functional.normalize(torch.randn(500, n, generator=generator, dtype=torch.float64), dim=1) for n in (300, 500))
    for d in (0.3, 0.1, 0.001):
        e, f = (torch.randn(x.shape, generator=generator, dtype=torch.float64) * (d / x.shape[1]) ** 0.5 for x in (u, v))
        squared = [
            float((torch.outer(a + x, b + y) - torch.outer(a, b)).square().sum()) for a, b, x, y in zip(u, v, e, f, strict=True)
        ]
        assert sum(squared) / len(squared) == pytest.approx(2 * d + d * d, rel=0.02)


def test_strong_components_get_more_bits_and_weak_ones_none() -> None:
    sigmas = {"a": 0.6 ** torch.arange(16, dtype=torch.float64), "b": 0.01 * 0.6 ** torch.arange(16, dtype=torch.float64)}
    bits = bits_for_size(sigmas, {"a": 640, "b": 640}, DISTORTION, 3000)
    assert len(set(bits["a"])) >= 3
    assert len(bits["b"]) < len(bits["a"]) < 16
    assert bits_for_size(sigmas, {"a": 640, "b": 640}, DISTORTION, 2000, protected={"b"})["b"] == (2,)
    weighted = bits_for_size(sigmas, {"a": 640, "b": 640}, DISTORTION, 3000, weights={"b": 1e4})
    assert all(abs(x - y) <= 2 for x, y in itertools.zip_longest(weighted["a"], weighted["b"], fillvalue=0))
    assert bits_for_size({"a": torch.zeros(3)}, {"a": 8}, DISTORTION, 100) == {"a": ()}


def test_exact_component_bytes_are_what_is_counted() -> None:
    sigmas = {"a": torch.linspace(2, 1, 16, dtype=torch.float64)}

    def exact(name: str, bits: int) -> int:
        return 100 * bits + 37

    bits = bits_for_size(sigmas, {"a": 800}, DISTORTION, 5000, component_bytes=exact)
    assert 4700 <= sum(exact("a", b) for b in bits["a"]) <= 5000


@pytest.mark.parametrize("target", [3_000_000, 20_000_000])
def test_many_components_meet_a_size_within_two_percent_and_beat_one_width(target: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sigmas, widths = {}, {}
    for index in range(1000):
        decay, scale = (float(x) for x in torch.rand(2, generator=generator, dtype=torch.float64))
        sigmas[f"m{index}"] = (0.3 + scale) * torch.exp(-0.3 * decay * torch.arange(64, dtype=torch.float64))
        widths[f"m{index}"] = int(torch.randint(640, 6000, (1,), generator=generator))
    start = time.perf_counter()
    bits = bits_for_size(sigmas, widths, DISTORTION, target)
    assert time.perf_counter() - start < 10.0
    assert 0.98 * target <= bytes_of(widths, dict.fromkeys(widths, 0), bits) <= target
    for width in DISTORTION:
        alone = bits_for_size(sigmas, widths, {width: DISTORTION[width]}, target)
        assert squared_error(sigmas, bits, DISTORTION) < squared_error(sigmas, alone, DISTORTION)
