"""`select_ranks` against its formulas, written out one component at a time."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lora_compress import PruningSettings
from lora_compress.pruning import select_ranks


def brute_force(
    sigmas: dict[str, list[float]], ratio: str, threshold: float, min_rank: int, cap: int, share: float
) -> dict[str, int]:
    """The docstring of select_ranks, literally; rank_ratio is exact decimal arithmetic."""
    whole = sum(s * s for sigma in sigmas.values() for s in sigma)
    staying = {
        name: sigma
        for name, sigma in sigmas.items()
        if sum(s * s for s in sigma) >= share * whole and sum(s * s for s in sigma) ** 0.5 >= threshold
    }
    survivors = [(s, name) for name, sigma in staying.items() for i, s in enumerate(sigma) if s >= threshold and i < cap]
    budget = max(1, int(Fraction(ratio) * sum(map(len, sigmas.values()))))
    kept = [name for _, name in sorted(survivors, reverse=True)[:budget]]
    floor = {name: min(min_rank, cap, len(sigma)) for name, sigma in sigmas.items()}
    return {name: max(kept.count(name), floor[name]) if name in staying else 0 for name in sigmas}


def spectra(seed: int) -> dict[str, list[float]]:
    rng = random.Random(seed)
    modules = {f"m{index}": rng.randint(1, 12) for index in range(rng.randint(1, 6))}
    return {
        name: sorted((rng.uniform(0.1, 3.0) * 0.7 ** rng.randint(0, 9) for _ in range(k)), reverse=True)
        for name, k in modules.items()
    }


def tensors(sigmas: dict[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(sigma, dtype=torch.float64) for name, sigma in sigmas.items()}


@pytest.mark.parametrize("seed", range(20))
def test_ranks_match_brute_force(seed: int) -> None:
    sigmas = spectra(seed)
    for ratio in ("0.01", "0.3", "0.55", "1.0"):
        for threshold in (0.0, 0.2, 2.0):
            for min_rank in (0, 1, 4):
                for cap in (4, 6, 100):
                    for share in (0.0, 0.1):
                        settings = PruningSettings(
                            float(ratio), threshold, min_rank, new_rank=None if cap == 100 else cap, layer_threshold=share
                        )
                        expected = brute_force(sigmas, ratio, threshold, min_rank, cap, share)
                        assert select_ranks(tensors(sigmas), settings) == expected, settings


def test_every_ratio_keeps_exactly_floor_q_n_components() -> None:
    sigma = {"m": torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(descending=True).values}
    for percent in range(1, 101):
        kept = select_ranks(sigma, PruningSettings(rank_ratio=percent / 100, min_rank=0))["m"]
        assert kept == percent, f"rank_ratio={percent / 100} kept {kept}"


def test_default_settings_keep_everything() -> None:
    sigmas = {"a": torch.tensor([1.0, 0.1]), "b": torch.tensor([5.0, 1e-9, 0.0])}
    assert select_ranks(sigmas, PruningSettings()) == {"a": 2, "b": 3}


def test_kept_components_are_the_strongest_of_the_whole_file() -> None:
    sigmas = {"strong": torch.tensor([9.0, 8.0, 7.0]), "weak": torch.tensor([1.0, 0.5, 0.4])}
    ranks = select_ranks(sigmas, PruningSettings(rank_ratio=0.5, min_rank=0))
    assert ranks == {"strong": 3, "weak": 0}


def test_norm_threshold_drops_modules_and_components() -> None:
    sigmas = {"weak": torch.tensor([0.5, 0.4]), "many small": torch.full((100,), 0.9), "strong": torch.tensor([2.0, 0.9])}
    assert select_ranks(sigmas, PruningSettings(norm_threshold=1.0, min_rank=0)) == {"weak": 0, "many small": 0, "strong": 1}
    assert select_ranks(sigmas, PruningSettings(norm_threshold=1.0, min_rank=3)) == {"weak": 0, "many small": 3, "strong": 2}


def test_ranks_of_a_file_without_modules() -> None:
    assert select_ranks({}, PruningSettings(rank_ratio=0.5)) == {}


def test_new_conv_rank_is_for_kernels_larger_than_1x1() -> None:
    sigmas = {name: torch.linspace(3, 1, 16) for name in ("linear", "1x1", "3x3", "3x1x1", "1d")}
    kernels = {"1x1": (1, 1), "3x3": (3, 3), "3x1x1": (3, 1, 1), "1d": (3,)}
    both = select_ranks(sigmas, PruningSettings(new_rank=8, new_conv_rank=2), kernels)
    assert both == {"linear": 8, "1x1": 8, "3x3": 2, "3x1x1": 2, "1d": 2}
    assert set(select_ranks(sigmas, PruningSettings(new_rank=8), kernels).values()) == {8}
    assert select_ranks(sigmas, PruningSettings(new_conv_rank=2), kernels) == {**both, "linear": 16, "1x1": 16}
    assert set(select_ranks(sigmas, PruningSettings(new_rank=1)).values()) == {1}
    assert set(select_ranks(sigmas, PruningSettings(new_rank=99)).values()) == {16}


def test_new_rank_caps_what_a_dynamic_method_asks_for_and_min_rank_lifts_it() -> None:
    sigmas = {"flat": torch.ones(10), "steep": 10.0 ** -torch.arange(10), "zero": torch.zeros(10)}
    settings = PruningSettings(dynamic_method="energy", dynamic_param=0.9)
    assert select_ranks(sigmas, settings) == {"flat": 9, "steep": 1, "zero": 1}
    settings = PruningSettings(dynamic_method="energy", dynamic_param=0.9, new_rank=4, min_rank=2)
    assert select_ranks(sigmas, settings) == {"flat": 4, "steep": 2, "zero": 2}
    settings = PruningSettings(dynamic_method="energy", dynamic_param=0.9, min_rank=0)
    assert select_ranks(sigmas, settings)["zero"] == 0


@pytest.mark.parametrize(
    "settings", [PruningSettings(norm_threshold=5.0), PruningSettings(layer_threshold=0.5), PruningSettings(0.1, min_rank=0)]
)
def test_a_protected_module_keeps_a_component(settings: PruningSettings) -> None:
    sigmas = {"strong": torch.linspace(90, 10, 9), "weak": torch.tensor([0.2, 0.1])}
    assert select_ranks(sigmas, settings)["weak"] == 0
    assert select_ranks(sigmas, settings, protected={"weak"})["weak"] >= 1


def test_the_floor_follows_the_criterion_unless_given() -> None:
    assert PruningSettings(rank_ratio=0.5).rank_floor == PruningSettings(norm_threshold=0.1).rank_floor == 4
    for values in ({"new_rank": 2}, {"new_conv_rank": 2}, {"dynamic_method": "knee"}):
        assert PruningSettings(**values).rank_floor == 1
        assert PruningSettings(**values, min_rank=2).rank_floor == 2
    assert PruningSettings(min_rank=0).rank_floor == 0


def test_scores_rank_across_modules() -> None:
    sigma = torch.tensor([4.0, 2.0, 1.0])
    ranks = select_ranks({"a": sigma, "b": sigma * 100}, PruningSettings(rank_ratio=0.5, min_rank=0))
    assert ranks == {"a": 0, "b": 3}
    relative = select_ranks({"a": sigma / 1.0, "b": sigma * 100 / 110}, PruningSettings(rank_ratio=0.5, min_rank=0))
    assert relative == {"a": 2, "b": 1}
