"""Dynamic ranks against their definitions and against sd-scripts' networks/resize_lora.py."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_compress.pruning import dynamic_rank, knee_rank

PARAMS = {
    "sv_ratio": (1.0, 1.5, 2.0, 5.0, 20.0, 1e6),
    "sv_fro": (0.1, 0.5, 0.9, 0.99, 0.9999),
    "sv_cumulative": (0.05, 0.5, 0.9, 0.99),
}


def random_spectrum(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 40, (1,), generator=generator))
    decay = float(torch.rand(1, generator=generator))
    return (torch.rand(size, generator=generator) * torch.exp(-decay * torch.arange(size))).sort(descending=True).values + 1e-3


def exact_rank(sigma: list[int], method: str, param: Fraction) -> int:
    """The definition in rational arithmetic, trying every rank from 1 up."""
    for rank in range(1, len(sigma)):
        left, right = {
            "sv_ratio": (Fraction(sigma[0]), sigma[rank] * param),
            "sv_cumulative": (Fraction(sum(sigma[:rank])), param * sum(sigma)),
            "sv_fro": (Fraction(sum(s * s for s in sigma[:rank])), param**2 * sum(s * s for s in sigma)),
            "energy": (Fraction(sum(s * s for s in sigma[:rank])), param * sum(s * s for s in sigma)),
        }[method]
        if left >= right:
            return rank
    return len(sigma)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=20).map(lambda values: sorted(values, reverse=True)),
    st.sampled_from(["sv_ratio", "sv_fro", "sv_cumulative", "energy"]),
    st.integers(1, 64),
)
def test_rank_is_the_least_that_meets_the_definition(sigma: list[int], method: str, param: int) -> None:
    value = Fraction(param) if method == "sv_ratio" else Fraction(param, 64)
    got = dynamic_rank(torch.tensor(sigma, dtype=torch.float64), method, float(value))
    assert got == exact_rank(sigma, method, value)


@pytest.mark.parametrize(("method", "param"), [(method, param) for method, params in PARAMS.items() for param in params])
def test_ranks_are_those_of_sd_scripts(sd_scripts: Path, method: str, param: float) -> None:
    resize = importlib.import_module("networks.resize_lora")
    for seed in range(40):
        sigma = random_spectrum(seed).double()
        theirs = resize.rank_resize(sigma, len(sigma), method, param)["new_rank"]
        assert dynamic_rank(sigma, method, param) == theirs, (seed, sigma)


@pytest.mark.parametrize("sd_scripts_at", ["v0.9.1", "v0.10.1"], indirect=True)
def test_old_sd_scripts_keep_one_component_too_many(sd_scripts_at: Path, torchvision_repair: Path) -> None:
    code = (
        "import torch, networks.resize_lora as r\n"
        "s = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])\n"
        "print(*(r.rank_resize(s, 6, m, p)['new_rank'] for m, p in "
        "[('sv_ratio', 1.5), ('sv_ratio', 5.0), ('sv_fro', 0.8), ('sv_cumulative', 0.8)]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(torchvision_repair)}
    done = subprocess.run([sys.executable, "-c", code], cwd=sd_scripts_at, env=env, capture_output=True, text=True)
    theirs = [int(word) for word in done.stdout.split()[-4:]]
    sigma = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])
    ours = [dynamic_rank(sigma, m, p) for m, p in [("sv_ratio", 1.5), ("sv_ratio", 5.0), ("sv_fro", 0.8), ("sv_cumulative", 0.8)]]
    assert ours == [1, 3, 1, 3]
    assert theirs == [rank + 1 for rank in ours], done.stderr


def test_rank_1_is_possible_and_zero_has_rank_0() -> None:
    steep = torch.tensor([100.0, 1.0, 0.1, 0.01])
    for method, param in (("sv_ratio", 5.0), ("sv_fro", 0.9), ("sv_cumulative", 0.9), ("energy", 0.9), ("knee", None)):
        assert dynamic_rank(steep[:1], method, param) == 1
        assert dynamic_rank(torch.zeros(4), method, param) == dynamic_rank(torch.zeros(0), method, param) == 0
        if method != "knee":
            assert dynamic_rank(steep, method, param) == 1


@given(st.floats(1e-20, 1e20), st.integers(0, 50))
def test_no_method_depends_on_the_scale(factor: float, seed: int) -> None:
    sigma = random_spectrum(seed).double()
    for method, param in (("sv_ratio", 5.0), ("sv_fro", 0.9), ("sv_cumulative", 0.9), ("energy", 0.9), ("knee", 1.0)):
        assert dynamic_rank(sigma, method, param) == dynamic_rank(sigma * factor, method, param)


@pytest.mark.parametrize("count", [3, 5, 9])
@pytest.mark.parametrize("drop", [3.0, 10.0, 1e4])
def test_the_knee_separates_components_from_noise(count: int, drop: float) -> None:
    plateau = torch.cat([torch.linspace(1.1, 1.0, count), torch.linspace(1.1, 1.0, 40)[:3] / drop])
    assert knee_rank(plateau) == count
    fall = torch.cat([drop ** -torch.linspace(0, 1, count + 1), torch.full((20,), 1 / drop)])
    assert knee_rank(fall) == count
    assert knee_rank(fall, sensitivity=1000.0) == len(fall)


def test_a_straight_log_spectrum_has_no_knee() -> None:
    for decay, count in ((0.5, 24), (0.9, 30), (0.99, 30)):  # 0.5^24 is below 1e-7, numerically zero
        assert knee_rank(decay ** torch.arange(30.0, dtype=torch.float64)) == count
    assert knee_rank(torch.ones(8)) == 8


def test_numerical_zeros_are_no_components() -> None:
    assert knee_rank(torch.tensor([3.0, 2.5, 2.0, 1.7, 1e-8, 1e-9])) == 4
    assert knee_rank(torch.tensor([3.0, 1e-8])) == 1
