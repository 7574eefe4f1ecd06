"""`thin_svd` against the SVD of the dense matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.factories import dense, random_update, update_of_spectrum

from lora_compress import CompressionSettings, FormatError, LowRankUpdate, compress, thin_svd
from lora_compress.spectrum import quick_svds


def _rank_deficient() -> LowRankUpdate:
    update = random_update(rank=6)
    mix = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    return LowRankUpdate(mix @ update.down[:2], update.up, update.alpha)


def _duplicated_rows() -> LowRankUpdate:
    update = random_update(rank=3)
    return LowRankUpdate(update.down.repeat(2, 1), update.up.repeat(1, 2), 3.0)


def _far_apart() -> LowRankUpdate:
    """Singular values 1, 1e-4 and 1e-8, in factors whose rows mix them."""
    update = update_of_spectrum([1.0, 1e-4, 1e-8])
    mix = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    return LowRankUpdate(mix @ update.down.double(), update.up.double() @ mix.T, update.alpha)


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
    assert spectrum.kernel == tuple(update.down.shape[2:])
    torch.testing.assert_close(spectrum.sigma, expected, rtol=1e-10, atol=1e-13 * largest)
    assert (spectrum.sigma.diff() <= 0).all()
    v = spectrum.mix_down @ update.down.double().flatten(1)  # (k, in * kernel), times sqrt(sigma)
    u = spectrum.mix_up @ update.up.double().flatten(1).T
    for rows in (u, v):
        torch.testing.assert_close(rows @ rows.T, torch.diag(spectrum.sigma), rtol=0, atol=1e-11 * largest)
    torch.testing.assert_close(u.T @ v, matrix, rtol=0, atol=1e-11 * largest)


@pytest.mark.parametrize("decades", [1, 2, 4])
def test_every_singular_value_is_right_however_far_below_the_largest(decades: int) -> None:
    """Factors of condition 10^decades each: the smallest sigma is 10^(-2 decades) of the largest, and right to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    factors = []
    for width in (300, 200):
        basis = torch.linalg.qr(torch.randn(width, 16, generator=generator, dtype=torch.float64))[0].T
        mixed = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
        factors.append(mixed @ (torch.logspace(0, -decades, 16, dtype=torch.float64).unsqueeze(1) * basis))
    update = LowRankUpdate(factors[0], factors[1].T, 16.0)
    # the product of two QR factors, in float64 throughout: the dense SVD itself is only right relative to the largest
    core = torch.linalg.qr(factors[1].T)[1] @ torch.linalg.qr(factors[0].T)[1].T
    torch.testing.assert_close(thin_svd(update).sigma, torch.linalg.svdvals(core), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_balanced_is_the_best_approximation_of_its_rank(rank: int) -> None:
    update = random_update(rank=8, kernel=(3, 3), alpha=-2.0)
    matrix = dense(update)
    down, up = (rows.double() for rows in thin_svd(update).balanced(rank))
    tail = torch.linalg.svdvals(matrix)[rank:].norm()  # Eckart-Young
    assert float((matrix - up.T @ down).norm()) == pytest.approx(float(tail), rel=1e-6, abs=1e-6 * float(matrix.norm()))
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


def _garbage(matrix: torch.Tensor, full_matrices: bool) -> tuple[torch.Tensor, ...]:
    size = len(matrix)
    return torch.eye(size, dtype=matrix.dtype), torch.full((size,), 0.1, dtype=matrix.dtype), torch.eye(size, dtype=matrix.dtype)


def _gives_up(matrix: torch.Tensor, full_matrices: bool) -> tuple[torch.Tensor, ...]:
    raise torch.linalg.LinAlgError("failed to converge")


@pytest.mark.parametrize("broken", [_garbage, _gives_up])
def test_a_decomposition_that_went_wrong_is_noticed(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.linalg.svd, []

    def first_broken(matrix: torch.Tensor, full_matrices: bool) -> tuple[torch.Tensor, ...]:
        calls.append(len(matrix))
        return broken(matrix, full_matrices) if len(calls) == 1 else real(matrix, full_matrices=full_matrices)

    update = random_update(rank=6)
    expected = torch.linalg.svdvals(dense(update))[:6]
    monkeypatch.setattr(torch.linalg, "svd", first_broken)
    torch.testing.assert_close(thin_svd(update).sigma, expected)  # the second device is asked
    assert len(calls) == 2
    monkeypatch.setattr(torch.linalg, "svd", broken)
    with pytest.raises(FormatError, match="decomposition failed"):
        thin_svd(update)


def test_updates_of_one_shape_come_apart_together_as_they_do_alone() -> None:
    updates = [random_update(rank=6, seed=seed, kernel=(3, 3), alpha=alpha) for seed, alpha in enumerate((4.0, -3.0, 0.5))]
    for update, found in zip(updates, quick_svds(updates), strict=True):
        alone = thin_svd(update)
        assert found is not None
        torch.testing.assert_close(found.sigma, alone.sigma, rtol=1e-12, atol=0.0)
        down, up = found.balanced(6)
        torch.testing.assert_close((up.T @ down).double(), dense(update), rtol=0, atol=1e-5 * float(alone.sigma[0]))


@pytest.mark.parametrize(
    "update",
    [CASES["rank above out"], CASES["rank 0"], CASES["rank deficient"], CASES["duplicated rows"], CASES["zero"]]
    + [random_update(magnitude=float("nan")), _far_apart()],
)
def test_what_needs_more_care_is_not_taken_apart_quickly(update: LowRankUpdate) -> None:
    assert quick_svds([update]) == [None]
    regular = random_update(rank=len(update.down), inputs=update.down.shape[1], outputs=len(update.up))
    if 0 < len(update.down) <= min(len(update.up), update.down.shape[1]):
        first, second = quick_svds([update, regular])
        assert first is None and second is not None  # the others do not suffer


def test_eigenvectors_that_went_wrong_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda matrix: (real(matrix)[0], torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix))
    )
    assert quick_svds([random_update()]) == [None]
