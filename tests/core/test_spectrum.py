"""`thin_svd` against the SVD of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from core.factories import dense, random_update

from lora_compress import CompressionSettings, FormatError, LowRankUpdate, compress, thin_svd


def _rank_deficient() -> LowRankUpdate:
    update = random_update(rank=6)
    mix = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    return LowRankUpdate(mix @ update.down[:2], update.up, update.alpha)


def _duplicated_rows() -> LowRankUpdate:
    update = random_update(rank=3)
    return LowRankUpdate(update.down.repeat(2, 1), update.up.repeat(1, 2), 3.0)


CASES = {
    "linear": random_update(),
    "convolution": random_update(kernel=(3, 3)),
    "1d convolution": random_update(kernel=(5,)),
    "rank above out": random_update(rank=9, outputs=5),
    "rank above in": random_update(rank=9, inputs=5),
    "rank above both": random_update(rank=30),
    "rank above a convolution": random_update(rank=40, inputs=3, kernel=(3, 3), outputs=50),
    "rank 1": random_update(rank=1),
    "rank 0": LowRankUpdate(torch.zeros(0, 7, 3, 3), torch.zeros(5, 0, 1, 1), 1.0),
    "rank deficient": _rank_deficient(),
    "duplicated rows": _duplicated_rows(),
    "zero": LowRankUpdate(torch.randn(4, 20), torch.zeros(24, 4), 4.0),
    "alpha 0.5": random_update(alpha=0.5),
    "negative alpha": random_update(alpha=-3.0),
    "fp16": random_update(dtype=torch.float16),
    "bf16": random_update(dtype=torch.bfloat16, kernel=(3, 3)),
    "fp8": random_update(dtype=torch.float8_e4m3fn),
    "huge": random_update(magnitude=1e30),
    "tiny": random_update(magnitude=1e-30),
    "subnormal": random_update(magnitude=1e-41),
    "unbalanced": LowRankUpdate(random_update().down * 1e20, random_update().up * 1e-20, 4.0),
}


@pytest.mark.parametrize("update", CASES.values(), ids=CASES.keys())
def test_matches_the_dense_svd(update: LowRankUpdate) -> None:
    matrix = dense(update)
    spectrum = thin_svd(update)
    count = min(len(update.down), *matrix.shape)
    expected = torch.linalg.svdvals(matrix)[:count]
    largest = float(expected[0]) if count else 0.0
    assert spectrum.u.shape == (count, matrix.shape[0])
    assert spectrum.v.shape == (count, matrix.shape[1])
    assert spectrum.kernel == tuple(update.down.shape[2:])
    torch.testing.assert_close(spectrum.sigma, expected, rtol=1e-12, atol=1e-13 * largest)
    assert (spectrum.sigma.diff() <= 0).all()
    for vectors in (spectrum.u, spectrum.v):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12)
    rebuilt = spectrum.u.T @ torch.diag(spectrum.sigma) @ spectrum.v
    torch.testing.assert_close(rebuilt, matrix, rtol=0, atol=1e-12 * largest)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_balanced_is_the_best_approximation_of_its_rank(rank: int) -> None:
    update = random_update(rank=8, kernel=(3, 3), alpha=-2.0)
    matrix = dense(update)
    down, up = thin_svd(update).balanced(rank)
    tail = torch.linalg.svdvals(matrix)[rank:].norm()  # Eckart-Young
    assert float((matrix - up.T @ down).norm()) == pytest.approx(float(tail), rel=1e-9, abs=1e-12 * float(matrix.norm()))
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["down", "up", "alpha"])
@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"save_format": "fp8"}], ids=str)
def test_what_is_not_finite_is_refused_by_name(value: float, where: str, settings: dict[str, object]) -> None:
    bad = random_update()
    if where == "alpha":
        bad = LowRankUpdate(bad.down, bad.up, value)
    else:
        getattr(bad, where)[1, 2] = value
    with pytest.raises(FormatError, match=r"^lora_unet_bad: .*NaN or infinity.*diverged"):
        compress({"lora_unet_good": random_update(), "lora_unet_bad": bad}, CompressionSettings.parse(settings))
