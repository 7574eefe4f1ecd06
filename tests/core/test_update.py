"""`LowRankUpdate` and its errors against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from core.factories import dense, random_update

from lora_compress import FormatError, LowRankUpdate
from lora_compress.spectrum import balanced_rows, thin_svd
from lora_compress.update import differences, relative_error, squared_error

PAIRS = {
    "other rank": (random_update(rank=4), random_update(rank=7, seed=1)),
    "other alpha": (random_update(alpha=1.0), random_update(alpha=-5.0, seed=1)),
    "convolution": (random_update(kernel=(3, 3)), random_update(kernel=(3, 3), rank=2, seed=1)),
    "other dtype": (random_update(dtype=torch.float16), random_update(dtype=torch.bfloat16, seed=1)),
    "rank 0": (random_update(), LowRankUpdate(torch.zeros(0, 20), torch.zeros(24, 0), 1.0)),
    "huge": (random_update(magnitude=1e30), random_update(magnitude=1e30, seed=1)),
    "tiny": (random_update(magnitude=1e-30), random_update(magnitude=1e-30, seed=1)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_squared_error_matches_dense(pair: tuple[LowRankUpdate, LowRankUpdate]) -> None:
    reference, other = pair
    error, norm = squared_error(reference, other)
    assert error == pytest.approx(float((dense(reference) - dense(other)).square().sum()), rel=1e-12)
    assert norm == pytest.approx(float(dense(reference).square().sum()), rel=1e-12)


def test_squared_error_of_a_close_copy_and_of_a_removed_module() -> None:
    reference = random_update(rank=8, inputs=60, outputs=50)
    close = LowRankUpdate(reference.down.half(), reference.up.half(), reference.alpha)
    exact = float((dense(reference) - dense(close)).square().sum())
    assert squared_error(reference, close)[0] == pytest.approx(exact, rel=1e-6)  # 1e-7 of the norm: what cancels must not show
    error, norm = squared_error(reference, None)
    assert error == norm == pytest.approx(float(dense(reference).square().sum()))


def test_squared_error_of_the_same_update_in_other_factors_vanishes() -> None:
    reference = random_update(rank=3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    turned = LowRankUpdate(turn @ reference.down.double(), reference.up.double() @ turn.T, reference.alpha)
    error, norm = squared_error(reference, turned)
    assert relative_error(error, norm) < 1e-7


@pytest.mark.parametrize("noise", [2.0**-12, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("balance", [1.0, 8.0, 0.03, 1e3])
@pytest.mark.parametrize("kept", [6, 4, 1, 0])
def test_differences_of_several_modules_match_dense(noise: float, balance: float, kept: int) -> None:
    spectra = [thin_svd(random_update(rank=6, inputs=60, outputs=50, seed=seed)) for seed in range(3)]
    down, up = balanced_rows(spectra, 6)
    generator = torch.Generator().manual_seed(7)
    other_down, other_up = (
        rows[:, :kept] * (1 + noise * torch.randn(rows[:, :kept].shape, generator=generator)) for rows in (down, up)
    )
    found = differences(down, up, other_down / balance, other_up * balance)
    exact = up.mT.double() @ down.double() - other_up.mT.double() @ other_down.double()
    torch.testing.assert_close(found, exact.square().sum(dim=(1, 2)), rtol=2e-4, atol=0.0)


def test_differences_do_not_need_rows_that_match() -> None:
    """They are more exact where rows match, but another order must not blow them up."""
    down, up = balanced_rows([thin_svd(random_update(rank=6, inputs=60, outputs=50))], 6)
    order = [4, 1, 5, 0]
    exact = up.mT.double() @ down.double() - up[:, order].mT.double() @ down[:, order].double()
    torch.testing.assert_close(
        differences(down, up, down[:, order], up[:, order]), exact.square().sum(dim=(1, 2)), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    ("squared", "norm", "expected"),
    [(0.0, 0.0, 0.0), (0.0, 4.0, 0.0), (1.0, 4.0, 0.5), (4.0, 4.0, 1.0), (1e-300, 1e-298, 0.1), (1.0, 0.0, math.inf)],
)
def test_relative_error(squared: float, norm: float, expected: float) -> None:
    assert relative_error(squared, norm) == pytest.approx(expected)


@pytest.mark.parametrize("kernel", [(), (4,), (3, 3), (1, 1), (2, 3, 2)], ids=str)
def test_from_matrices_gives_a_layer_its_shapes_back(kernel: tuple[int, ...]) -> None:
    update = random_update(kernel=kernel)
    again = LowRankUpdate.from_matrices(update.down_matrix, update.up_matrix, update.alpha, kernel)
    assert torch.equal(again.down, update.down)
    assert torch.equal(again.up, update.up)
    torch.testing.assert_close(update.dense(), dense(update))


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((4, 5), (6, 3)),
        ((4,), (6,)),
        ((4, 5, 3, 3), (6, 4)),
        ((4, 5), (6, 4, 1, 1)),
        ((4, 5, 3, 3), (6, 4, 3, 3)),
        ((5, 4), (4, 6)),
    ],
    ids=str,
)
def test_factors_that_do_not_fit_are_refused_with_both_shapes(down: tuple[int, ...], up: tuple[int, ...]) -> None:
    with pytest.raises(FormatError) as caught:
        LowRankUpdate(torch.zeros(down), torch.zeros(up), 1.0)
    assert str(down) in str(caught.value)
    assert str(up) in str(caught.value)


@pytest.mark.parametrize("power", [-40, -25, -22, -3, 0, 3, 22, 25, 30])
@pytest.mark.parametrize("balance", [0, 6])
def test_differences_are_true_where_squares_leave_the_range_of_float32(power: int, balance: int) -> None:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, 4, 30, generator=generator)
    up = torch.linalg.qr(torch.randn(2, 20, 4, generator=generator)).Q.mT.contiguous()
    other_down, other_up = down + 0.1 * torch.randn(2, 4, 30, generator=generator), up.clone()
    wanted = differences(down.double(), up.double(), other_down.double(), other_up.double())
    scale = 10.0 ** min(power, 0), 10.0 ** max(power, 0)
    gain = scale[0] * scale[1]
    found = differences(down * gain, up, other_down * gain * 10.0**balance, other_up * 10.0**-balance)
    assert torch.allclose(found / gain**2, wanted, rtol=1e-3)
