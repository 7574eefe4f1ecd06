"""Layouts of two factors: any rank, size, kernel, type and alpha comes out as the update it stands for, and goes back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from core.layouts.files import FLOATS, PAIRS, assert_close, cp, dense, product, random, save, scaled, written_back
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_compress import FormatError, LowRankUpdate
from lora_compress.sources import LoraSource
from lora_compress.sources.open import open_lora
from lora_compress.update import ModuleShape

sizes = st.integers(1, 9)
kernels = st.sampled_from([(), (1,), (3,), (1, 1), (3, 3), (1, 5), (3, 1, 1), (2, 2, 2)])
alphas = st.one_of(st.none(), st.sampled_from([0.0, 1.0, -2.0, 16.0, 1e-6, 0.5]))


@settings(max_examples=150, deadline=None)
@given(
    style=st.sampled_from(sorted(PAIRS)),
    rank=st.integers(1, 12),
    inputs=sizes,
    outputs=sizes,
    kernel=kernels,
    flat=st.sampled_from(["", "up", "down"]),
    alpha=alphas,
    alpha_type=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]),
    alpha_shape=st.sampled_from([(), (1,), (1, 1)]),
    types=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
)
def test_every_pair_is_read_and_written_back(
    style, rank, inputs, outputs, kernel, flat, alpha, alpha_type, alpha_shape, types
) -> None:
    layout, down_end, up_end = PAIRS[style]
    ones = (1,) * len(kernel)
    down, up = random(rank, inputs, *kernel).mul(3).to(types[0]), random(outputs, rank, *ones, seed=1).mul(3).to(types[1])
    if flat == "up":
        up = up.reshape(outputs, rank)
    if flat == "down" and set(kernel) == {1}:
        down = down.reshape(rank, inputs)
    tensors = {f"some.layer{down_end}": down, f"some.layer{up_end}": up}
    alpha = None if layout == "control_lora" else alpha
    stored = None if alpha is None else torch.full(alpha_shape, alpha).to(alpha_type)
    if stored is not None:
        tensors["some.layer.alpha"] = stored
        alpha = float(stored.flatten()[0])
    with tempfile.TemporaryDirectory() as folder, open_lora(save(tensors, Path(folder))) as source:
        assert source.layout == layout
        assert list(source) == ["some.layer"]
        update = source["some.layer"]
        assert source.shapes["some.layer"] == ModuleShape(outputs, inputs, kernel, rank)
        assert tuple(update.down.shape) == (rank, inputs, *kernel)
        expected = product(up, down) * scaled(alpha, rank)
        torch.testing.assert_close(dense(update), expected, rtol=1e-12, atol=0)
        assert source.factor_bytes("some.layer") == sum(tensor.nbytes for tensor in tensors.values())
        assert list(source.others) == []
        assert ("alpha is 0" in " ".join(source.notes)) == (alpha == 0)
        again = written_back(source, "some.layer", update, torch.float64)
    ends = (down_end, up_end, ".alpha") if layout == "kohya" else (down_end, up_end)
    assert set(again) == {f"some.layer{end}" for end in ends}
    with tempfile.TemporaryDirectory() as folder, open_lora(save(again, Path(folder))) as source:
        torch.testing.assert_close(dense(source["some.layer"]), expected, rtol=1e-6, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    inputs=sizes,
    outputs=sizes,
    kernel=st.sampled_from([(), (3,), (3, 3), (1, 1), (3, 2, 2)]),
    alpha=st.sampled_from([None, 2.0, -1.0]),
    flat=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_a_middle_factor_is_merged_exactly(ranks, inputs, outputs, kernel, alpha, flat, dtype) -> None:
    ones = () if flat else (1,) * len(kernel)
    down, mid = random(ranks[1], inputs, *ones, dtype=dtype), random(*ranks, *kernel, seed=1, dtype=dtype)
    up = random(outputs, ranks[0], *ones, seed=2, dtype=dtype)
    tensors = {"m.lora_down.weight": down, "m.lora_mid.weight": mid, "m.lora_up.weight": up}
    if alpha is not None:
        tensors["m.alpha"] = torch.tensor(alpha)
    with tempfile.TemporaryDirectory() as folder, open_lora(save(tensors, Path(folder))) as source:
        update = source["m"]
        assert source.shapes["m"] == ModuleShape(outputs, inputs, kernel, ranks[0])
        assert tuple(update.down.shape) == (ranks[0], inputs, *kernel)
        # alpha is divided by the rows of lora_down, as ComfyUI and AUTOMATIC1111 do
        exact = cp(mid, up.double().flatten(1).T, down.double().flatten(1)).flatten(1) * scaled(alpha, ranks[1])
        assert_close(dense(update), exact, 1e-15 if dtype == torch.float64 else 1e-6)
        assert "lora_mid" in source.notes[0]
        assert source.plain_keys("m").of_module("m") == [f"m.{e}" for e in ("lora_down.weight", "lora_up.weight", "alpha")]


def test_two_numbered_updates_of_one_attention_processor_are_two_modules(tmp_path: Path) -> None:
    name = "double_blocks.0.processor.qkv_lora"
    tensors = {
        f"{name}{n}.{side}.weight": random(*shape, seed=n) for n in (1, 2) for side, shape in (("down", (2, 6)), ("up", (9, 2)))
    }
    source = open_lora(save(tensors, tmp_path))
    assert list(source) == [f"{name}1", f"{name}2"]
    again = {}
    for module, update in source.items():
        again |= written_back(source, module, update)
    assert again.keys() == tensors.keys()
    for module, update in open_lora(save(again, tmp_path, name="again.safetensors")).items():
        assert_close(dense(update), dense(source[module]), 1e-6)


def test_a_scale_of_its_own_replaces_alpha_and_is_not_written_again(tmp_path: Path) -> None:
    tensors = {"x.lora_down.weight": random(4, 6), "x.lora_up.weight": random(5, 4), "x.alpha": torch.tensor(8.0)}
    source = open_lora(save({**tensors, "x.scale": torch.tensor(0.25)}, tmp_path))
    torch.testing.assert_close(dense(source["x"]), 0.25 * product(tensors["x.lora_up.weight"], tensors["x.lora_down.weight"]))
    assert list(source.others) == []
    assert source.extras("x") == {}
    assert "x.scale" not in source.plain_keys("x").of_module("x")


def test_the_bias_of_a_peft_up_factor_is_scaled_with_the_factors(tmp_path: Path) -> None:
    tensors = {
        "x.lora_A.weight": random(4, 6),
        "x.lora_B.weight": random(5, 4),
        "x.lora_B.bias": random(5),
        "x.alpha": torch.tensor(8.0),
    }
    source = open_lora(save(tensors, tmp_path))
    torch.testing.assert_close(source.extras("x")["x.lora_B.bias"], 2 * tensors["x.lora_B.bias"])


def forward(source: LoraSource, name: str, x: torch.Tensor) -> torch.Tensor:
    update: LowRankUpdate = source[name]
    return x.double() @ dense(update).T


def test_the_update_is_that_of_a_forward_pass_through_two_layers(tmp_path: Path) -> None:
    down, up = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(4, 5, bias=False)
    source = open_lora(save({"x.lora_A.weight": down.weight.detach(), "x.lora_B.weight": up.weight.detach()}, tmp_path))
    x = random(7, 6)
    torch.testing.assert_close(forward(source, "x", x).float(), up(down(x)).detach())


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        ("_lora_down.weight", "_lora_up.weight", ".alpha"),
        ("_lora_down.weight", "_lora_up.weight", "_lora_down.alpha"),
        ("_lora_A.weight", "_lora_B.weight", ".alpha"),
        (".lora_down.weight", ".lora_up.weight", ".alpha"),
    ],
)
@pytest.mark.parametrize("prefix", ["lora_unet_unet_", "lora_unet_"])
def test_kohya_keys_of_other_converters_come_out_as_programs_know_them(
    prefix: str, down: str, up: str, alpha: str, tmp_path: Path
) -> None:
    layer, one, two = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", random(4, 6), random(5, 4, seed=1)
    name = prefix + layer
    path = save({name + down: one, name + up: two, name + alpha: torch.tensor(2.0)}, tmp_path)
    with open_lora(path) as source:
        assert list(source) == [f"lora_unet_{layer}"] and not source.others and source.part(f"lora_unet_{layer}") == "U-Net"
        assert_close(dense(source[f"lora_unet_{layer}"]), 0.5 * product(two, one), 1e-6)
        assert source.plain_keys(f"lora_unet_{layer}").of_module(layer)[0] == f"{layer}.lora_down.weight"


def test_endings_that_other_methods_use_as_well_are_refused(tmp_path: Path) -> None:
    """Experts and shared halves: base_lora_down, fera_lora_down, shared_lora_A."""
    good = {"g.lora_down.weight": random(2, 4), "g.lora_up.weight": random(3, 2)}
    for ending in ("base_lora_down.weight", "shared_lora_A.weight"):
        with pytest.raises(FormatError, match="is a part of an update that is not read here"):
            open_lora(save({**good, f"x.{ending}": random(2, 4)}, tmp_path))


@pytest.mark.parametrize(
    ("down", "up"), [(".lora_a.weight", ".lora_b.weight"), (".lora_layer.down.weight", ".lora_layer.up.weight")]
)
def test_other_spellings_of_the_same_factors(down: str, up: str, tmp_path: Path) -> None:
    one, two = random(4, 6), random(5, 4, seed=1)
    with open_lora(save({f"x{down}": one, f"x{up}": two}, tmp_path)) as source:
        assert_close(dense(source["x"]), product(two, one), 1e-6)
        assert source.plain_keys("x").of_module("x") == [f"x{down}", f"x{up}"]
