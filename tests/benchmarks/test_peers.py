"""What ours is compared with: bitsandbytes' NF4, known errors, and a bound that nothing beats."""

from __future__ import annotations

import math

import pytest
import torch
from peers import FORMATS, decomposed, loraquant, shannon, truncated
from rate_distortion import bytes_at, curves_of, goals_of, interpolated, ours, synthetic

from lora_compress import LowRankUpdate

SHAPES = ((256, 384), (128, 256))


@pytest.mark.parametrize(("name", "rms"), [("fp16", 0.00021), ("int8", 0.0059), ("nf4", 0.0920)])
def test_formats_have_their_known_error_on_gaussian_rows(name: str, rms: float) -> None:
    """methods of the literature, computed: groups of 64, scales by the largest weight."""
    rows = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    found = float((FORMATS[name].round(rows) - rows).norm() / rows.norm())
    assert found == pytest.approx(rms, rel=0.05)


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    rows = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)).half().float()
    codes, state = functional.quantize_4bit(rows, blocksize=64, quant_type="nf4")
    expected = functional.dequantize_4bit(codes, state)
    torch.testing.assert_close(FORMATS["nf4"].round(rows), expected, rtol=1e-3, atol=1e-6)  # scales are float16 here


def test_truncation_to_full_rank_in_fp16_is_the_file_itself() -> None:
    updates = synthetic("1/i", 8, SHAPES)
    size, error = truncated(decomposed(updates), FORMATS["fp16"])[-1]
    assert size == sum(2 * update.numel for update in updates.values())
    assert error < 1e-3


def test_truncation_loses_what_the_spectrum_says() -> None:
    updates = synthetic("1/i", 8, ((200, 200),))
    modules = decomposed(updates)
    (module,) = modules.values()
    squares = module.sigma.square()
    for size, error in truncated(modules, FORMATS["fp16"]):
        rank = round(size / (2 * module.width))
        assert error == pytest.approx(math.sqrt(float(squares[rank:].sum() / squares.sum())), abs=1e-3)


def test_loraquant_counts_scales_and_zero_points() -> None:
    """Two components of width 128 + 128 in 2 bits: (256 x 2 + 2 groups of (16 + 2)) / 8 bytes each."""
    rows = torch.linalg.qr(torch.randn(128, 2, generator=torch.Generator().manual_seed(0)))[0]
    size, error = loraquant(decomposed({"a": LowRankUpdate(rows.T.contiguous(), rows, 2.0)}), 2, 0.99)
    assert size == 2 * (256 * 2 + 2 * 18) / 8
    assert 0.2 < error < 0.7


def test_shannons_bound_of_one_component_is_the_formula() -> None:
    """Both rows of width n at distortion d: n log2(1 / d) bits, error sqrt(2 d - d^2)."""
    rows = torch.linalg.qr(torch.randn(200, 1, generator=torch.Generator().manual_seed(0)))[0]
    seen = 0
    for size, error in shannon(decomposed({"a": LowRankUpdate(rows.T.contiguous(), rows, 1.0)})):
        if 0.01 < error < 0.5:
            d = 1 - math.sqrt(1 - error**2)
            assert size == pytest.approx(200 * math.log2(1 / d) / 8, rel=1e-6)
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("kind", ["1/i", "exp(-i/8)"])
def test_nothing_beats_shannons_bound(kind: str) -> None:
    updates = synthetic(kind, 16, SHAPES)
    curves = curves_of(updates, (0.05, 0.075, 0.1, 0.15, 0.2, 0.25))
    bound = curves.pop("Shannon's bound")
    for name, points in curves.items():
        for size, error in points:
            if 0.02 < error < 0.5:
                assert size > interpolated(bound, error), name
    assert all(goal.reached < 1 for goal in goals_of(kind, curves))


def test_ours_keeps_the_error_that_was_asked_for() -> None:
    points = ours(synthetic("1/i, Student-t 4", 8, SHAPES), {"strategy": "entropy"}, (0.05, 0.2))
    assert len(points) == 2
    assert all(0.95 * target < error <= target for (_, error), target in zip(points, (0.05, 0.2), strict=True))
    assert points[0][0] > points[1][0]


def test_bytes_at_an_error() -> None:
    points = [(100.0, 0.1), (50.0, 0.2), (10.0, 0.8)]
    assert bytes_at(points, 0.15) == 100.0
    assert bytes_at(points, 0.01) == math.inf
    assert interpolated(points, 0.2) == pytest.approx(50.0)
    assert interpolated(points, 0.1 * 2**0.5) == pytest.approx(75.0)
    assert interpolated(points, 0.05) == math.inf
