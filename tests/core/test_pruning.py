"""`select_ranks` against its formulas, written out one component at a time."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lora_compress import PruningSettings
from lora_compress.pruning import select_ranks


def brute_force(sigmas: dict[str, list[float]], ratio: str, threshold: float, min_rank: int) -> dict[str, int]:
    """The docstring of select_ranks, literally; rank_ratio is exact decimal arithmetic."""
    staying = [name for name, sigma in sigmas.items() if math.sqrt(math.fsum(s * s for s in sigma)) >= threshold]
    alive = [(s, name) for name in staying for s in sigmas[name] if s >= threshold]
    alive.sort(key=lambda component: -component[0])  # stable: ties go to the module that comes first
    budget = max(1, math.floor(Fraction(ratio) * sum(map(len, sigmas.values()))))
    kept = [name for _, name in alive[:budget]]
    return {name: max(kept.count(name), min(min_rank, len(sigma))) if name in staying else 0 for name, sigma in sigmas.items()}


def tensors(sigmas: dict[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(sigma, dtype=torch.float64) for name, sigma in sigmas.items()}


@pytest.mark.parametrize("seed", range(16))
def test_matches_brute_force_over_random_spectra(seed: int) -> None:
    rng = random.Random(seed)
    values = [0.25 * step for step in range(9)] if seed % 2 else None  # every other time values that tie, zero among them

    def spectrum() -> list[float]:
        drawn = [rng.choice(values) if values else rng.lognormvariate(0, 1) for _ in range(rng.randint(1, 9))]
        return sorted(drawn, reverse=True)

    sigmas = {f"m{index}": spectrum() for index in range(rng.randint(1, 8))}
    for ratio in ("0.01", "0.1", "0.3", "0.5", "0.7", "0.93", "1"):
        for threshold in (0.0, 0.3, 0.5, 1.0, 2.0, 30.0):
            for min_rank in (0, 1, 4, 100):
                settings = PruningSettings(float(ratio), threshold, min_rank)
                assert select_ranks(tensors(sigmas), settings) == brute_force(sigmas, ratio, threshold, min_rank), settings


@pytest.mark.parametrize("total", [1, 10, 100, 128, 1000, 32448])
def test_rank_ratio_is_taken_as_the_decimal_that_was_written(total: int) -> None:
    sigma = {"m": torch.linspace(2, 1, total, dtype=torch.float64)}
    for percent in range(1, 101):
        kept = select_ranks(sigma, PruningSettings(rank_ratio=percent / 100, min_rank=0))["m"]
        assert kept == max(1, total * percent // 100), percent


def test_nothing_is_removed_by_default() -> None:
    sigmas = tensors({"a": [3.0, 1e-30], "b": [1e-20, 0.0, 0.0]})
    assert select_ranks(sigmas, PruningSettings()) == {"a": 2, "b": 3}


def test_ties_go_to_the_module_that_comes_first_whatever_their_number() -> None:
    sigmas = {f"m{index}": torch.ones(8, dtype=torch.float64) for index in range(200)}
    ranks = select_ranks(sigmas, PruningSettings(rank_ratio=0.5, min_rank=0))
    assert list(ranks.values()) == [8] * 100 + [0] * 100


def test_a_module_goes_by_its_norm_and_a_component_by_its_own_size() -> None:
    sigmas = tensors({"weak": [0.4, 0.1], "many small": [0.9] * 4, "strong": [3.0, 0.5]})
    assert select_ranks(sigmas, PruningSettings(norm_threshold=1.0, min_rank=0)) == {"weak": 0, "many small": 0, "strong": 1}
    assert select_ranks(sigmas, PruningSettings(norm_threshold=1.0, min_rank=3)) == {"weak": 0, "many small": 3, "strong": 2}


def test_no_modules_no_ranks() -> None:
    assert select_ranks({}, PruningSettings(rank_ratio=0.5)) == {}
