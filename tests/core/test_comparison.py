"""Comparison against dense float64 matrices, and against exact arithmetic where float64 ends."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from core.factories import dense, mixed_updates, random_update
from safetensors.torch import save_file

from lora_compress import FormatError, LowRankUpdate, as_kohya
from lora_compress.inspection.comparison import compare_files, difference_norm, match_names


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("ranks", [(4, 4), (8, 2), (30, 3)])
def test_difference_is_that_of_the_dense_matrices(kernel: tuple[int, ...], ranks: tuple[int, int]) -> None:
    first = random_update(ranks[0], kernel=kernel, alpha=3.0, seed=1)
    second = random_update(ranks[1], kernel=kernel, alpha=-2.0, seed=2)
    expected = float((dense(first) - dense(second)).norm())
    assert difference_norm(first, second) == pytest.approx(expected, rel=1e-12)
    assert difference_norm(first, None) == pytest.approx(float(dense(first).norm()), rel=1e-12)
    assert difference_norm(None, second) == pytest.approx(float(dense(second).norm()), rel=1e-12)
    assert difference_norm(None, None) == 0.0


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-8])
def test_nearly_equal_updates_keep_seven_digits(step: float) -> None:
    """Against rational arithmetic: at 1e-8 a difference of Gram matrices has no digit left."""
    first = random_update(3, inputs=7, outputs=6, seed=3)
    down = first.down.double()
    second = LowRankUpdate(down * (1 + step * torch.linspace(-1, 1, 7, dtype=torch.float64)), first.up.double(), first.alpha)
    reference = LowRankUpdate(down, first.up.double(), first.alpha)
    assert difference_norm(reference, second) == pytest.approx(_exact_difference(reference, second), rel=1e-7)


def test_equal_updates_differ_by_exactly_nothing() -> None:
    assert difference_norm(random_update(seed=1), random_update(seed=1)) == 0.0


def test_files_of_other_layouts_ranks_and_modules(tmp_path: Path) -> None:
    updates = mixed_updates(rank=6)
    save_file(as_kohya(updates), tmp_path / "a.safetensors")
    name = "lora_unet_mid_block_attentions_0_proj_in"
    less = {key: update for key, update in updates.items() if key != name} | {"lora_unet_extra": random_update(2, seed=5)}
    save_file(as_kohya(less) | {"bundle_emb.x": torch.ones(2)}, tmp_path / "b.safetensors")
    result = compare_files(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    norms = {key: float(dense(update).square().sum()) for key, update in updates.items()}
    extra = float(dense(less["lora_unet_extra"]).square().sum())
    assert result.missing == (("lora_unet_extra",), (name,))
    assert result.others == ("bundle_emb.x",)
    assert result.relative_error == pytest.approx(((norms[name] + extra) / sum(norms.values())) ** 0.5, rel=1e-6)
    by_name = {module.name: module for module in result.modules}
    assert by_name[name].relative_error == pytest.approx(1.0) and by_name[name].rank == (6, 0)
    assert by_name["lora_unet_extra"].relative_error == float("inf") and by_name["lora_unet_extra"].rank == (0, 2)
    assert all(by_name[key].squared_error == 0.0 for key in updates if key != name)


def test_a_peft_file_meets_its_kohya_twin(tmp_path: Path) -> None:
    update = random_update(4, seed=8, alpha=4.0)
    save_file(as_kohya({"lora_unet_transformer_blocks_0_attn_to_q": update}), tmp_path / "kohya.safetensors")
    peft = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": update.down.contiguous()}
    peft["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = update.up.contiguous()
    save_file(peft, tmp_path / "peft.safetensors")
    result = compare_files(str(tmp_path / "kohya.safetensors"), str(tmp_path / "peft.safetensors"))
    assert result.missing == ((), ()) and result.relative_error < 1e-7


def test_files_without_a_common_module_are_refused(tmp_path: Path) -> None:
    save_file(as_kohya({"lora_unet_a": random_update()}), tmp_path / "a.safetensors")
    save_file(as_kohya({"lora_unet_b": random_update()}), tmp_path / "b.safetensors")
    save_file(as_kohya({"lora_unet_a": random_update(inputs=21)}), tmp_path / "c.safetensors")
    with pytest.raises(FormatError, match=r"no module in common.*lora_unet_a.*lora_unet_b"):
        compare_files(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    with pytest.raises(FormatError, match="lora_unet_a: is 24 x 20 in one file and 24 x 21 in the other"):
        compare_files(str(tmp_path / "a.safetensors"), str(tmp_path / "c.safetensors"))


def test_names_match_across_layouts_and_never_across_encoders() -> None:
    kohya = ["lora_unet_x_0_to_q", "lora_te1_layers_0_fc1", "lora_te2_layers_0_fc1", "lora_te_only"]
    other = ["text_encoder.layers.0.fc1", "text_encoder_2.layers.0.fc1", "unet.x.0.to.q", "lora_unet_only"]
    assert match_names(kohya, other) == {kohya[0]: other[2], kohya[1]: other[0], kohya[2]: other[1]}
    assert match_names(["unet.a.b", "unet.a_b"], ["lora_unet_a_b"]) == {}  # which of the two cannot be told
    assert match_names(["unet.a.b", "unet.a_b"], ["unet.a_b"]) == {"unet.a_b": "unet.a_b"}


def _exact_difference(first: LowRankUpdate, second: LowRankUpdate) -> float:
    total = Fraction(0)
    rows, columns, rank = len(first.up), first.down.shape[1], first.rank
    for i in range(rows):
        for j in range(columns):
            entry = sum(
                Fraction(float(first.up[i, k])) * Fraction(float(first.down[k, j]))
                - Fraction(float(second.up[i, k])) * Fraction(float(second.down[k, j]))
                for k in range(rank)
            )
            total += entry * entry
    scaled = total * Fraction(first.alpha) ** 2 / rank**2
    return float(scaled) ** 0.5
