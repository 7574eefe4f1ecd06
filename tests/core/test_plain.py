"""Plain files: the update stays what it was, in the form that every consumer reads right."""

from __future__ import annotations

import math

import pytest
import torch
from core.factories import dense, dense_error, mixed_updates, random_update

from lora_compress import CompressionSettings, FormatError, LowRankUpdate, compress
from lora_compress.layouts import from_kohya
from lora_compress.layouts.plain import FP8

ODD = {
    "alpha 0.5": random_update(alpha=0.5),
    "alpha 1": random_update(rank=7, alpha=1.0),
    "negative alpha": random_update(rank=7, alpha=-3.0),
    "alpha 0": random_update(alpha=0.0),
    "convolution": random_update(kernel=(3, 3), alpha=0.3),
    "rank 1": random_update(rank=1, alpha=5.0),
    "rank 1 convolution": random_update(rank=1, alpha=-5.0, kernel=(3, 3)),
    "unbalanced": LowRankUpdate(random_update().down * 1e12, random_update().up * 1e-9, 2.0),
    "zero": LowRankUpdate(random_update().down, torch.zeros(24, 4), 4.0),
    "fp16": random_update(dtype=torch.float16, rank=7, alpha=3.0),
    "fp8": random_update(dtype=FP8, rank=7, alpha=3.0),
    "fp8 rank 1": random_update(dtype=FP8, rank=1, alpha=3.0),
}


def to_kohya(updates: dict[str, LowRankUpdate], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All components of `updates`, as a plain file holds them."""
    return compress(updates, CompressionSettings.parse({"save_format": "fp8"} if dtype == FP8 else {}), dtype).tensors


@pytest.mark.parametrize("update", ODD.values(), ids=ODD.keys())
def test_the_update_stays_the_same_to_float32_rounding(update: LowRankUpdate) -> None:
    (result,) = from_kohya(to_kohya({"m": update}, torch.float32))[0].values()
    expected = dense(update)
    torch.testing.assert_close(dense(result), expected, rtol=0, atol=4e-7 * float(expected.abs().amax()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, FP8])
def test_one_alpha_for_all_and_ranks_from_two(dtype: torch.dtype) -> None:
    tensors = to_kohya(ODD | mixed_updates(), dtype)
    names = {key.split(".lora_")[0] for key in tensors if ".lora_down" in key}
    assert names == {*ODD, *mixed_updates()}
    assert set(tensors) == {f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    alphas = {float(tensors[f"{name}.alpha"]) for name in names}
    assert len(alphas) == 1
    assert math.frexp(alphas.pop())[0] == 0.5  # a power of two
    for name in names:
        assert tensors[f"{name}.alpha"].dtype == torch.float32
        assert tensors[f"{name}.alpha"].shape == ()
        assert len(tensors[f"{name}.lora_down.weight"]) >= 2
        for part in ("down", "up"):
            tensor = tensors[f"{name}.lora_{part}.weight"]
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()


@pytest.mark.parametrize("magnitude", [1e-12, 1e-4, 1.0, 1e5, 1e12])
def test_fp8_uses_the_range_where_it_is_exact_and_products_are_finite(magnitude: float) -> None:
    updates = {name: LowRankUpdate(u.down * magnitude, u.up, u.alpha) for name, u in mixed_updates(rank=16).items()}
    tensors = to_kohya(updates, FP8)
    result = from_kohya(tensors)[0]
    assert 0.03 < dense_error(updates, result) < 0.042
    strongest = max(float(tensors[key].float().abs().amax()) for key in tensors if key.endswith("weight"))
    assert 4 <= strongest <= 16
    generator = torch.Generator().manual_seed(0)
    for name, update in result.items():
        down, up = update.down_matrix.half(), update.up_matrix.half()
        assert torch.isfinite(up @ down).all(), name  # merged in fp16, before alpha / rank
        inputs = torch.randn(32, down.shape[1], generator=generator).half()
        assert torch.isfinite(inputs @ down.T @ up.T).all(), name  # or run beside the layer


@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e15])
def test_fp8_alpha_stays_a_float32_number(magnitude: float) -> None:
    alpha = float(to_kohya({"m": random_update(magnitude=magnitude)}, FP8)["m.alpha"])
    assert 0.0 < alpha < math.inf


def test_weights_beyond_the_dtype_are_refused_by_name() -> None:
    with pytest.raises(FormatError, match=r"^m: weights up to .* do not fit torch.float16"):
        to_kohya({"l": random_update(), "m": random_update(magnitude=1e9), "n": random_update()}, torch.float16)
