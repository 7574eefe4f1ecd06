"""LoHa, LoKr, GLoRA and full differences: the plain update that comes out is the one their formulas say, at its true rank."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from core.layouts.files import assert_close, cp, dense, random, save, scaled, written_back
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_compress import FormatError
from lora_compress.sources.open import open_lora

sizes = st.integers(1, 12)
small_ranks = st.integers(1, 4)
alphas = st.sampled_from([None, 0.0, 1.0, 6.0, -3.0])
kernels = st.sampled_from([(), (3,), (3, 3), (2, 2, 2)])
CONVERTED = 2e-6  # 1e-6 is cut, the rest is float32


def check(tensors: dict[str, Tensor], alpha: float | None, expected: Tensor, kernel: tuple[int, ...], kind: str) -> None:
    """`expected` (out, in, *kernel) comes out balanced, at its numerical rank, and stays itself through a plain kohya file."""
    if alpha is not None:
        tensors["lora_unet_m.alpha"] = torch.tensor(alpha)
    tensors["lora_unet_m.dora_scale"] = random(expected.shape[0], 1, seed=9)
    matrix = expected.flatten(1)
    with tempfile.TemporaryDirectory() as folder, open_lora(save(tensors, Path(folder))) as source:
        assert source.layout == kind
        assert source.is_balanced("lora_unet_m")
        update, shape = source["lora_unet_m"], source.shapes["lora_unet_m"]
        assert_close(dense(update), matrix, CONVERTED)
        assert (shape.outputs, shape.inputs, shape.kernel) == (*expected.shape[:2], kernel)
        assert tuple(update.down.shape) == (update.rank, expected.shape[1], *kernel)
        sigma = torch.linalg.svdvals(matrix)
        rank = int((sigma > 1e-5 * sigma[0]).sum()) if float(sigma[0]) > 0 else 1
        assert rank <= update.rank <= shape.rank
        check_balanced(update.down.double().flatten(1), update.up.double().flatten(1), sigma)
        assert torch.equal(source.extras("lora_unet_m")["lora_unet_m.dora_scale"], tensors["lora_unet_m.dora_scale"])
        assert list(source.others) == []
        assert source.factor_bytes("lora_unet_m") == sum(t.nbytes for k, t in tensors.items() if "dora" not in k)
        assert "converted to plain LoRA" in " ".join(source.notes)
        plain = written_back(source, "lora_unet_m", update)
    with tempfile.TemporaryDirectory() as folder, open_lora(save(plain, Path(folder))) as source:
        assert source.layout == "kohya"
        assert_close(dense(source["lora_unet_m"]), matrix, CONVERTED)


def check_balanced(down: Tensor, up: Tensor, sigma: Tensor) -> None:
    """Both Gram matrices are diag(sigma)."""
    expected = torch.diag(sigma[: len(down)])
    tolerance = 1e-6 * max(float(sigma[0]), 1e-30) * 4
    torch.testing.assert_close(down @ down.T, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(up.T @ up, expected, rtol=0, atol=tolerance)


@settings(max_examples=80, deadline=None)
@given(
    outputs=sizes,
    inputs=sizes,
    ranks=st.tuples(small_ranks, small_ranks),
    kernel=kernels,
    alpha=alphas,
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_loha(outputs, inputs, ranks, kernel, alpha, dtype) -> None:
    w1a, w2a = (random(outputs, r, seed=i, dtype=dtype) for i, r in enumerate(ranks))
    w1b, w2b = (random(r, inputs, *kernel, seed=2 + i, dtype=dtype) for i, r in enumerate(ranks))
    expected = torch.einsum("or,r...->o...", w1a.double(), w1b.double()) * torch.einsum("or,r...->o...", w2a.double(), w2b.double())
    tensors = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b}
    check({f"lora_unet_m.{key}": t for key, t in tensors.items()}, alpha, expected * scaled(alpha, ranks[0]), kernel, "loha")


@settings(max_examples=60, deadline=None)
@given(outputs=sizes, inputs=sizes, rank=small_ranks, kernel=kernels.filter(bool), alpha=alphas)
def test_loha_with_core_tensors(outputs, inputs, rank, kernel, alpha) -> None:
    a1, a2, b1, b2 = (random(rank, size, seed=i) for i, size in enumerate((outputs, outputs, inputs, inputs)))
    t1, t2 = random(rank, rank, *kernel, seed=7), random(rank, rank, *kernel, seed=8)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "hada_t1": t1, "hada_t2": t2}
    expected = cp(t1, a1, b1) * cp(t2, a2, b2) * scaled(alpha, rank)
    check({f"lora_unet_m.{key}": t for key, t in tensors.items()}, alpha, expected, kernel, "loha")


@settings(max_examples=120, deadline=None)
@given(
    small=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    large=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=kernels,
    ranks=st.tuples(st.none() | small_ranks, st.none() | small_ranks),
    tucker=st.booleans(),
    alpha=alphas,
)
def test_lokr(small, large, kernel, ranks, tucker, alpha) -> None:
    tensors, dim = {}, ranks[1] or ranks[0]
    if ranks[0]:
        tensors |= {"lokr_w1_a": random(small[0], ranks[0], seed=1), "lokr_w1_b": random(ranks[0], small[1], seed=2)}
        w1 = tensors["lokr_w1_a"].double() @ tensors["lokr_w1_b"].double()
    else:
        tensors["lokr_w1"] = random(*small, seed=3)
        w1 = tensors["lokr_w1"].double()
    if ranks[1] and tucker and kernel:
        tensors |= {"lokr_t2": random(ranks[1], ranks[1], *kernel, seed=4)}
        tensors |= {"lokr_w2_a": random(ranks[1], large[0], seed=5), "lokr_w2_b": random(ranks[1], large[1], seed=6)}
        w2 = cp(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    elif ranks[1]:
        tensors |= {"lokr_w2_a": random(large[0], ranks[1], seed=5), "lokr_w2_b": random(ranks[1], large[1], *kernel, seed=6)}
        w2 = torch.einsum("or,r...->o...", tensors["lokr_w2_a"].double(), tensors["lokr_w2_b"].double())
    else:
        tensors["lokr_w2"] = random(*large, *kernel, seed=7)
        w2 = tensors["lokr_w2"].double()
    expected = torch.kron(w1.reshape(*small, *([1] * len(kernel))), w2.contiguous()) * (scaled(alpha, dim) if dim else 1.0)
    check({f"lora_unet_m.{key}": t for key, t in tensors.items()}, alpha, expected, kernel, "lokr")


@settings(max_examples=40, deadline=None)
@given(outputs=sizes, inputs=sizes, kernel=kernels, rank=st.none() | small_ranks)
def test_full_difference(outputs, inputs, kernel, rank) -> None:
    diff = random(outputs, inputs, *kernel)
    if rank:
        diff = torch.einsum("or,r...->o...", random(outputs, rank), random(rank, inputs, *kernel, seed=1))
    check({"lora_unet_m.diff": diff}, None, diff.double(), kernel, "full")


@pytest.mark.parametrize(("rows", "columns"), [(600, 640), (640, 600), (700, 530)])
def test_a_large_full_difference_of_low_rank_is_found_out(rows: int, columns: int, tmp_path: Path) -> None:
    falling = torch.logspace(0, -4, 20)
    diff = (random(rows, 20) * falling) @ random(20, columns, seed=1)
    update = open_lora(save({"m.diff": diff}, tmp_path))["m"]
    assert update.rank == 20
    assert_close(dense(update), diff.double(), CONVERTED)
    sigma = update.down.double().square().sum(1)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(diff.double())[:20], rtol=1e-5, atol=0)


def test_lokr_of_two_whole_matrices_ignores_alpha(tmp_path: Path) -> None:
    """LyCORIS stores an alpha there (often 1e10) and every consumer sets the scale to 1."""
    tensors = {"m.lokr_w1": random(3, 3), "m.lokr_w2": random(5, 4, seed=1), "m.alpha": torch.tensor(1e10)}
    expected = torch.kron(tensors["m.lokr_w1"].double(), tensors["m.lokr_w2"].double())
    assert_close(dense(open_lora(save(tensors, tmp_path))["m"]), expected, CONVERTED)


@pytest.mark.parametrize(
    ("name", "columns", "shape"),
    [
        ("lora_unet_down_blocks_0_resnets_1_conv1", 90, (10, 3, 3)),
        ("lora_unet_input_blocks_3_0_op", 90, (10, 3, 3)),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", 90, (10, 3, 3)),
        ("lora_unet_down_blocks_1_resnets_0_conv_shortcut", 90, (90, 1, 1)),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", 90, (90,)),
        ("lora_unet_down_blocks_0_resnets_1_conv1", 89, (89,)),
    ],
)
def test_the_kernel_of_a_flattened_convolution_comes_back(name: str, columns: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {
        f"{name}.hada_w{i}_{side}": random(*size, seed=i) for i in (1, 2) for side, size in (("a", (8, 2)), ("b", (2, columns)))
    }
    source = open_lora(save(tensors, tmp_path))
    assert tuple(source[name].down.shape[1:]) == shape
    assert (source.shapes[name].inputs, *source.shapes[name].kernel) == shape


def glora(outputs: int, inputs: int, rank: int, older: bool, trained: bool) -> tuple[dict[str, Tensor], Tensor]:
    a_in, a_out, up, down = (
        random(inputs, rank),
        random(rank, inputs) * trained,
        random(outputs, rank),
        random(rank, inputs, seed=3),
    )
    parts = (a_out.contiguous(), a_in, down, up) if older else (a_in, a_out, up, down)
    tensors = {f"m.{part}.weight": tensor for part, tensor in zip(("a1", "a2", "b1", "b2"), parts, strict=True)}
    return tensors, up.double() @ down.double()


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(12, 9), (9, 12), (10, 10)])
def test_glora_that_leaves_the_base_weights_alone_is_plain(outputs: int, inputs: int, older: bool, tmp_path: Path) -> None:
    tensors, expected = glora(outputs, inputs, 3, older, trained=False)
    source = open_lora(save({**tensors, "m.alpha": torch.tensor(6.0)}, tmp_path))
    assert_close(dense(source["m"]), 2 * expected, 1e-12)
    assert source.shapes["m"] == (type(source.shapes["m"]))(outputs, inputs, (), 3)
    assert list(source.others) == []


def test_glora_on_the_base_weights_is_carried_through_and_told(tmp_path: Path) -> None:
    tensors, _ = glora(12, 9, 3, older=False, trained=True)
    plain = {"x.lora_down.weight": random(2, 5), "x.lora_up.weight": random(5, 2)}
    source = open_lora(save({**tensors, **plain}, tmp_path))
    assert list(source) == ["x"]
    assert source.others.keys() == tensors.keys()
    assert any("GLoRA multiplies the base" in note for note in source.notes)
    with pytest.raises(FormatError, match=r"holds no low-rank update .*GLoRA multiplies the base"):
        open_lora(save(tensors, tmp_path, name="only.safetensors"))


@pytest.mark.parametrize("key", ["m.oft_blocks", "m.on_input", "m.boft_R"])
def test_what_multiplies_the_base_is_carried_through_to_the_bit(key: str, tmp_path: Path) -> None:
    plain = {"x.lora_down.weight": random(2, 5), "x.lora_up.weight": random(5, 2)}
    source = open_lora(save({**plain, key: random(2, 3, 3)}, tmp_path))
    assert torch.equal(source.others[key], random(2, 3, 3))
    assert any("multiplies the base" in note for note in source.notes)


def test_norms_and_biases_of_full_training_are_carried_through(tmp_path: Path) -> None:
    others = {
        "m.diff_b": random(5),
        "n.w_norm": random(7),
        "n.b_norm": random(7),
        "o.diff": random(4),
        "bundle_emb.x.string_to_param.*": random(2, 3),
    }
    source = open_lora(save({"m.diff": random(5, 6), **others}, tmp_path))
    assert list(source) == ["m"]
    assert {key: tensor.tolist() for key, tensor in source.others.items()} == {
        key: tensor.tolist() for key, tensor in others.items()
    }


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_converted_factors_stay_in_range(scale: float, tmp_path: Path) -> None:
    diff = random(6, 5) * scale
    assert_close(dense(open_lora(save({"m.diff": diff}, tmp_path))["m"]), diff.double(), CONVERTED)


def test_nan_in_a_converted_module_is_an_error_that_names_it(tmp_path: Path) -> None:
    source = open_lora(save({"m.diff": torch.full((3, 4), float("nan"))}, tmp_path))
    with pytest.raises(FormatError, match=r"lora\.safetensors: m: its .* hold NaN"):
        source["m"]


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), 1e10, 100000.0, 0.0])
def test_lokr_of_two_whole_matrices_has_no_use_for_alpha(alpha: float, tmp_path: Path) -> None:
    """LyCORIS writes whatever was asked for there, and no program reads it."""
    w1, w2 = random(2, 3), random(4, 5, seed=1)
    tensors = {"lora_unet_m.lokr_w1": w1, "lora_unet_m.lokr_w2": w2, "lora_unet_m.alpha": torch.tensor(alpha)}
    source = open_lora(save(tensors, tmp_path))
    assert_close(dense(source["lora_unet_m"]), torch.kron(w1.double(), w2.double()), 1e-5)
    assert not source.others and list(source.notes) == [note for note in source.notes if "converted" in note]


@pytest.mark.parametrize("parts", [{"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)}], ids=["one product"])
def test_lokr_with_a_product_needs_its_alpha(parts: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    tensors = {f"lora_unet_m.{part}": random(*shape) for part, shape in parts.items()}
    with pytest.raises(FormatError, match=r"alpha: inf .*allowed: a finite number"):
        open_lora(save({**tensors, "lora_unet_m.alpha": torch.tensor(float("inf"))}, tmp_path))


@pytest.mark.parametrize("layout", ["loha", "lokr"])
def test_a_scale_of_its_own_replaces_alpha_here_as_well(layout: str, tmp_path: Path) -> None:
    parts = {
        "loha": {"hada_w1_a": (4, 2), "hada_w1_b": (2, 5), "hada_w2_a": (4, 2), "hada_w2_b": (2, 5)},
        "lokr": {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)},
    }[layout]
    tensors = {f"m.{part}": random(*shape, seed=index) for index, (part, shape) in enumerate(parts.items())}
    plain = dense(open_lora(save(tensors, tmp_path))["m"])
    scaled = {**tensors, "m.alpha": torch.tensor(8.0), "m.scale": torch.tensor(0.25)}
    assert_close(dense(open_lora(save(scaled, tmp_path))["m"]), 0.25 * plain, 1e-5)


def test_a_difference_of_a_table_stays_as_it_is(tmp_path: Path) -> None:
    """A parameter that is no layer's weight has no pair of factors in any program."""
    tensors = {"diffusion_model.scale_shift_table.diff": random(2, 8), "diffusion_model.blocks.0.modulation.diff": random(1, 6, 8)}
    source = open_lora(save({**tensors, "diffusion_model.proj.diff": random(4, 8)}, tmp_path))
    assert list(source) == ["diffusion_model.proj"] and source.others.keys() == tensors.keys()
