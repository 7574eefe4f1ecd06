"""kohya's layout in memory: factors and alphas to the bit, and half modules refused."""

from __future__ import annotations

import pytest
import torch
from core.factories import dense, mixed_updates, random_update

from lora_compress import FormatError, LowRankUpdate, as_kohya
from lora_compress.layouts import from_kohya

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
    "fp8": random_update(dtype=torch.float8_e4m3fn, rank=7, alpha=3.0),
    "fp8 rank 1": random_update(dtype=torch.float8_e4m3fn, rank=1, alpha=3.0),
}


def test_as_kohya_keeps_factors_and_alpha_to_the_bit() -> None:
    updates = {name: update for name, update in ODD.items() if update.alpha}
    again, rest = from_kohya(as_kohya(updates))
    assert rest == {}
    for name, update in updates.items():
        assert torch.equal(again[name].down.float(), update.down.float())
        assert torch.equal(again[name].up.float(), update.up.float())
        assert again[name].alpha == pytest.approx(update.alpha, rel=1e-7)


@pytest.mark.parametrize("alpha", [None, torch.tensor(0.0), torch.tensor([0.0])], ids=str)
def test_a_missing_or_zero_alpha_means_the_rank(alpha: torch.Tensor | None) -> None:
    update = random_update(rank=6)
    tensors = {key: tensor for key, tensor in as_kohya({"m": update}).items() if not key.endswith("alpha")}
    if alpha is not None:
        tensors["m.alpha"] = alpha
    torch.testing.assert_close(dense(from_kohya(tensors)[0]["m"]), dense(update))


def test_the_input_is_left_alone_and_strangers_come_back() -> None:
    tensors = {**as_kohya(mixed_updates()), "lora_unet_x.dora_scale": torch.ones(3), "x.alpha": torch.ones(())}
    before = dict(tensors)
    updates, rest = from_kohya(tensors)
    assert tensors == before
    assert updates.keys() == mixed_updates().keys()
    assert rest.keys() == {"lora_unet_x.dora_scale", "x.alpha"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"m.lora_down.weight": torch.zeros(4, 3)}, "^m: has lora_down.weight but no lora_up"),
        ({"m.lora_up.weight": torch.zeros(3, 4), "m.alpha": torch.tensor(1.0)}, "^m: has lora_up.weight but no lora_down"),
        (
            {"m.lora_down.weight": torch.zeros(4, 3), "m.lora_up.weight": torch.zeros(3, 5)},
            r"^m: .*\(4, 3\) and .*\(3, 5\)",
        ),
        ({**as_kohya({"m": random_update()}), "m.alpha": torch.ones(2)}, r"^m: alpha has the shape \(2,\)"),
    ],
    ids=["lonely down", "lonely up", "unfit", "many alphas"],
)
def test_half_a_module_is_refused_by_name(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        from_kohya(tensors)
