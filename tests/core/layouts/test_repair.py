"""Files whose parts disagree: refused with one clear sentence, or repaired and told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core.layouts.files import dense, product, random, save
from torch import Tensor

from lora_compress import FormatError
from lora_compress.sources.open import open_lora

GOOD = {"g.lora_down.weight": random(2, 5), "g.lora_up.weight": random(6, 2), "g.alpha": torch.tensor(2.0)}
DOWN, UP = random(4, 5, seed=3), random(6, 4, seed=4)

# what is broken, the key named, what is left of module "m" (None: dropped): alpha / r * up @ down
BROKEN: dict[str, tuple[dict[str, Tensor], str, Tensor | None]] = {
    "up is narrower": ({"lora_down.weight": DOWN, "lora_up.weight": UP[:, :3]}, "lora_up.weight", product(UP[:, :3], DOWN[:3])),
    "down is narrower": ({"lora_down.weight": DOWN[:1], "lora_up.weight": UP}, "lora_up.weight", product(UP[:, :1], DOWN[:1])),
    "narrower with alpha": (
        {"lora_down.weight": DOWN, "lora_up.weight": UP[:, :2], "alpha": torch.tensor(2.0)},
        "lora_up.weight",
        0.5 * product(UP[:, :2], DOWN[:2]),
    ),
    "alpha for each row": (
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.full((4,), 2.0)},
        "alpha",
        0.5 * product(UP, DOWN),
    ),
    "many alphas": ({"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.arange(4.0)}, "alpha", product(UP, DOWN)),
    "no alpha in it": ({"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.ones(0)}, "alpha", product(UP, DOWN)),
    "alpha is NaN": (
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(float("nan"))},
        "alpha",
        product(UP, DOWN),
    ),
    "alpha is infinite": (
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor([float("inf")])},
        "alpha",
        product(UP, DOWN),
    ),
    "no up": ({"lora_down.weight": DOWN, "alpha": torch.tensor(2.0), "dora_scale": random(6)}, "lora_up.weight", None),
    "no down": ({"lora_up.weight": UP, "alpha": torch.tensor(2.0)}, "lora_up.weight", None),
    "flat down": ({"lora_down.weight": random(4), "lora_up.weight": UP}, "lora_down.weight", None),
    "empty down": ({"lora_down.weight": torch.zeros(0, 5), "lora_up.weight": torch.zeros(6, 0)}, "lora_down.weight", None),
    "six dimensions": ({"lora_down.weight": torch.zeros(4, 1, 1, 1, 1, 1), "lora_up.weight": UP}, "lora_down.weight", None),
    "integers": ({"lora_down.weight": torch.ones(4, 5).long(), "lora_up.weight": UP}, "lora_down.weight", None),
    "packed codes": ({"lora_down.weight": torch.ones(4, 5).byte(), "lora_up.weight": UP}, "lora_down.weight", None),
    "quantized elsewhere": (
        {"lora_down.weight": DOWN.to(torch.int8), "lora_up.weight": UP, "lora_down.weight.nvfp4_scale": torch.ones(1)},
        "lora_down.weight.nvfp4_scale",
        None,
    ),
    "int8 without a scale": ({"lora_down.weight": DOWN.to(torch.int8), "lora_up.weight": UP}, "lora_down.weight", None),
    "a part that is not known": ({"lora_down.weight": DOWN, "lora_up.weight": UP, "scale": random(4)}, "scale", None),
    "singular values": ({"lora_A": DOWN, "lora_B": UP, "lora_E": random(4, 1)}, "lora_E", None),
    "a bias as large as the weight": ({"lora_down.weight": DOWN, "lora_up.weight": UP, "bias": random(6, 5)}, "bias", None),
    "a part beside diffusers' keys": (
        {"to_q_lora.down.weight": DOWN, "to_q_lora.up.weight": UP, "to_q_lora.gate.weight": random(4)},
        "to_q_lora.gate.weight",
        None,
    ),
    "kernel in up": ({"lora_down.weight": DOWN, "lora_up.weight": random(6, 4, 3, 3)}, "lora_up.weight", None),
    "mid beside a kernel": (
        {"lora_down.weight": random(4, 5, 3, 3), "lora_mid.weight": random(4, 4, 3, 3), "lora_up.weight": UP},
        "lora_mid.weight",
        None,
    ),
    "LoHa of two sizes": ({"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP[:5], "hada_w2_b": DOWN}, "hada_w1_a", None),
    "LoHa of three": ({"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP}, "hada_w2_b", None),
    "LoHa without its second core": (
        {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP, "hada_w2_b": DOWN, "hada_t1": random(4, 4, 3)},
        "hada_t2",
        None,
    ),
    "LoKr without w2": ({"lokr_w1": DOWN}, "lokr_w2_a", None),
    "LoKr that does not fit": ({"lokr_w1": DOWN, "lokr_w2_a": UP, "lokr_w2_b": random(3, 5)}, "lokr_w1", None),
    "GLoRA that does not fit": ({"a1.weight": DOWN, "a2.weight": DOWN, "b1.weight": UP, "b2.weight": DOWN}, "a1.weight", None),
}


@pytest.mark.parametrize(("parts", "key", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_what_disagrees_is_refused_by_name_or_repaired(
    parts: dict[str, Tensor], key: str, expected: Tensor | None, tmp_path: Path
) -> None:
    path = save({**GOOD, **{f"m.{part}": tensor for part, tensor in parts.items()}}, tmp_path)
    with pytest.raises(FormatError) as refused:
        open_lora(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: m.{key}: ")
    assert "allowed: " in message
    assert "--force_resize" in message
    source = open_lora(path, repair=True)
    assert any(note.startswith(f"m.{key}: ") for note in source.notes)
    assert list(source) == (["g"] if expected is None else ["g", "m"])
    torch.testing.assert_close(dense(source["g"]), product(GOOD["g.lora_up.weight"], GOOD["g.lora_down.weight"]))
    if expected is not None:
        torch.testing.assert_close(dense(source["m"]), expected)
        assert source.shapes["m"].rank == source["m"].rank
    assert list(source.others) == []


def test_a_middle_factor_of_another_rank_is_cut(tmp_path: Path) -> None:
    down, mid, up = random(4, 5, 1, 1), random(3, 2, 3, 3), random(6, 4, 1, 1)
    path = save({"m.lora_down.weight": down, "m.lora_mid.weight": mid, "m.lora_up.weight": up}, tmp_path)
    with pytest.raises(FormatError, match=r"m\.lora_mid\.weight: has the shape \(3, 2, 3, 3\).*rank 4 second.*and 1 more"):
        open_lora(path)
    source = open_lora(path, repair=True)
    expected = torch.einsum("om,mnxy,ni->oixy", up[:, :3, 0, 0].double(), mid.double(), down[:2, :, 0, 0].double()).flatten(1)
    torch.testing.assert_close(dense(source["m"]), expected, rtol=1e-5, atol=1e-5)
    assert len(source.notes) == 3


def test_two_adapters_of_one_module_are_refused(tmp_path: Path) -> None:
    tensors = {
        f"x.lora_{side}.{name}.weight": random(*size) for name in ("one", "two") for side, size in (("A", (2, 4)), ("B", (3, 2)))
    }
    path = save(tensors, tmp_path)
    with pytest.raises(FormatError, match=r"x\.lora_A\.two\.weight: a second update of the module of x\.lora_A\.one\.weight"):
        open_lora(path)
    assert open_lora(path, repair=True)["x"].rank == 2


def test_a_file_of_nothing_but_broken_modules_is_refused_after_repair_too(tmp_path: Path) -> None:
    path = save({"m.lora_down.weight": DOWN}, tmp_path)
    with pytest.raises(FormatError, match=r"holds no low-rank update.*m\.lora_up\.weight: is missing: the module is left out"):
        open_lora(path, repair=True)


def test_a_sound_file_is_the_same_with_repair(tmp_path: Path) -> None:
    source = open_lora(save(GOOD, tmp_path), repair=True)
    assert source.notes == []
    assert torch.equal(source["g"].down, GOOD["g.lora_down.weight"])


def test_an_alpha_that_is_no_real_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.pt"
    torch.save({**GOOD, "g.alpha": torch.tensor(1j)}, path)
    with pytest.raises(FormatError, match=r"g\.alpha: nan .*allowed: a finite number"):
        open_lora(path)
    torch.testing.assert_close(
        dense(open_lora(path, repair=True)["g"]), product(GOOD["g.lora_up.weight"], GOOD["g.lora_down.weight"])
    )
