"""The weighted spectrum against the dense SVD of dW C^(1/2), with C from real inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lora_compress import FormatError, LowRankUpdate
from lora_compress.weighting import Calibration, Moments, diagonal_gram, factors_digest, save_calibration, weighted_spectrum


def module(seed: int, inputs: int, outputs: int, rank: int, alpha: float = 3.0, kernel: tuple[int, ...] = ()) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, *kernel, generator=generator, dtype=torch.float64)
    up = torch.randn(outputs, rank, *([1] * len(kernel)), generator=generator, dtype=torch.float64)
    return LowRankUpdate(down, up, alpha)


def second_moment(seed: int, width: int, samples: int) -> Tensor:
    """C of inputs with correlated channels of very different sizes; singular where samples < width."""
    generator = torch.Generator().manual_seed(seed + 1)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64) @ mixing
    x = x * torch.exp(torch.linspace(-2, 2, width, dtype=torch.float64))
    return x.T @ x / samples


def root(c: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def rows(update: LowRankUpdate, spectrum: object, rank: int) -> tuple[Tensor, Tensor]:
    return spectrum.mix_down[:rank] @ update.down_matrix, spectrum.mix_up[:rank] @ update.up_matrix.T


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(1, 8),
    st.sampled_from([2, 6, 200]),
    st.sampled_from([3.0, -3.0]),
)
def test_every_prefix_is_the_best_of_its_rank(seed: int, inputs: int, outputs: int, rank: int, samples: int, alpha: float) -> None:
    update, c = module(seed, inputs, outputs, rank, alpha), second_moment(seed, inputs, samples)
    gram = update.down @ c @ update.down.T
    spectrum = weighted_spectrum(update, gram)
    dense, half = update.dense(), root(c)
    expected = torch.linalg.svdvals(dense @ half)
    whole = float(expected.square().sum())
    lifted = 2e-10 * float(torch.linalg.matrix_norm(gram, 2) * update.up.square().sum()) * update.scale**2  # by the floor, at most
    count = len(spectrum.sigma)
    assert (spectrum.sigma.diff() <= 0).all()
    for k in range(count + 1):
        down, up = rows(update, spectrum, k)
        reached = float(((dense - up.T @ down) @ half).square().sum())
        assert reached <= float(expected[k:].square().sum()) + lifted + 1e-9 * whole
        assert reached == pytest.approx(float(spectrum.sigma[k:].square().sum()), abs=lifted + 1e-9 * whole)
        plain = float((dense - up.T @ down).square().sum())
        assert plain == pytest.approx(float(spectrum.norms[k:].square().sum()), abs=1e-8 * float(dense.square().sum()))
    down, up = rows(update, spectrum, count)
    assert torch.allclose(up.T @ down, dense, atol=1e-8 * float(dense.abs().max()))
    assert torch.allclose(down.norm(dim=1), up.norm(dim=1), rtol=1e-6, atol=1e-6 * float(dense.norm()) ** 0.5)


def test_it_beats_the_plain_svd_where_activations_differ() -> None:
    update, c = module(0, 64, 48, 8), second_moment(0, 64, 500)
    half, dense = root(c), update.dense()
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    down, up = rows(update, weighted_spectrum(update, update.down @ c @ update.down.T), 3)
    plain = ((dense - u[:, :3] * s[:3] @ vh[:3]) @ half).norm()
    assert ((dense - up.T @ down) @ half).norm() < 0.9 * plain


def test_white_activations_give_the_plain_svd() -> None:
    update = module(1, 20, 30, 5)
    spectrum = weighted_spectrum(update, update.down @ update.down.T)
    expected = torch.linalg.svdvals(update.dense())[:5]
    assert torch.allclose(spectrum.sigma, expected) and torch.allclose(spectrum.norms, expected)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_diagonal_stands_for_a_diagonal_c(kernel: tuple[int, ...]) -> None:
    update = module(2, 12, 16, 4, kernel=kernel)
    width = update.down_matrix.shape[1]
    c = torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = diagonal_gram(update, c)
    assert torch.allclose(gram, update.down_matrix @ torch.diag(c) @ update.down_matrix.T)
    assert torch.allclose(weighted_spectrum(update, gram).sigma, torch.linalg.svdvals(update.dense() * c.sqrt())[:4])
    channels = torch.arange(1.0, 13.0)
    assert torch.equal(diagonal_gram(update, channels), diagonal_gram(update, channels.repeat_interleave(width // 12)))


def test_rank_deficient_and_zero_factors() -> None:
    update = module(3, 10, 10, 4)
    twice = LowRankUpdate(torch.cat([update.down, update.down]), torch.cat([update.up, update.up], 1), 8.0)
    c = second_moment(3, 10, 100)
    spectrum = weighted_spectrum(twice, twice.down @ c @ twice.down.T)
    down, up = rows(twice, spectrum, 4)
    assert torch.allclose(up.T @ down, twice.dense(), atol=1e-6)
    for dead in (LowRankUpdate(update.down, update.up * 0, 1.0), LowRankUpdate(update.down * 0, update.up, 1.0)):
        spectrum = weighted_spectrum(dead, dead.down @ c @ dead.down.T)
        down, up = rows(dead, spectrum, 4)
        assert torch.isfinite(spectrum.mix_down).all() and torch.isfinite(spectrum.mix_up).all()
        assert not (up.T @ down).any()
    down, up = rows(update, weighted_spectrum(update, torch.zeros(4, 4)), 4)
    assert torch.allclose(up.T @ down, update.dense())


@pytest.mark.parametrize(
    ("gram", "words"),
    [
        (torch.eye(3), "shape .* for rank 4"),
        (torch.full((4, 4), float("nan")), "not symmetric and finite"),
        (torch.arange(16.0).view(4, 4), "not symmetric"),
        (-torch.eye(4), "negative eigenvalue"),
    ],
)
def test_grams_that_are_none_are_refused(gram: Tensor, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        weighted_spectrum(module(4, 10, 10, 4), gram)


def test_diagonals_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match="7 second moments for 10 inputs"):
        diagonal_gram(module(4, 10, 10, 4), torch.ones(7))
    with pytest.raises(FormatError, match="negative"):
        diagonal_gram(module(4, 10, 10, 4), -torch.ones(10))


def half_precision(update: LowRankUpdate, dtype: torch.dtype = torch.float16) -> LowRankUpdate:
    return LowRankUpdate(update.down.to(dtype), update.up.to(dtype), update.alpha)


def test_a_calibration_file_gives_back_what_was_recorded(tmp_path: Path) -> None:
    updates = {"a": half_precision(module(0, 8, 9, 4)), "b.c": half_precision(module(1, 6, 5, 2), torch.bfloat16)}
    gram, diagonal = torch.eye(4) * 2 + 0.5, torch.arange(6.0)
    save_calibration(tmp_path / "c.safetensors", updates, {"a": Moments(gram), "b.c": Moments(diagonal=diagonal)})
    calibration = Calibration(tmp_path / "c.safetensors")
    assert len(calibration) == 2 and "a" in calibration and "x" not in calibration
    assert torch.equal(calibration.gram("a", updates["a"]), gram.double())
    assert torch.equal(calibration.gram("b.c", updates["b.c"]), diagonal_gram(updates["b.c"], diagonal))
    other_alpha = LowRankUpdate(updates["a"].down, updates["a"].up, 99.0)
    assert torch.equal(calibration.gram("a", other_alpha), gram.double())


def test_a_calibration_of_other_weights_is_refused(tmp_path: Path) -> None:
    update = half_precision(module(0, 8, 9, 4))
    save_calibration(tmp_path / "c.safetensors", {"a": update}, {"a": Moments(torch.eye(4))})
    calibration = Calibration(tmp_path / "c.safetensors")
    changed = update.up.clone()
    changed[0, 0] += 1
    for other in (LowRankUpdate(update.down, changed, 3.0), LowRankUpdate(update.down.bfloat16(), update.up.bfloat16(), 3.0)):
        assert factors_digest(other) != factors_digest(update)
        with pytest.raises(FormatError, match="other weights of a"):
            calibration.gram("a", other)
    with pytest.raises(FormatError, match="no moments of b"):
        calibration.gram("b", update)


def test_files_that_are_no_calibration_are_refused(tmp_path: Path) -> None:
    update, path = half_precision(module(0, 8, 9, 4)), tmp_path / "c.safetensors"
    with pytest.raises(FormatError, match="no such file"):
        Calibration(path)
    path.write_bytes(b"garbage")
    with pytest.raises(FormatError, match="no safetensors file"):
        Calibration(path)
    path.write_bytes((1 << 27).to_bytes(8, "little") + b"{" + b" " * (1 << 27))
    with pytest.raises(FormatError, match="a header of 134217728 bytes, allowed: "):
        Calibration(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="no calibration file"):
        Calibration(path)
    save_file({"a": torch.zeros(1)}, path, {"lora_compress.calibration": "2"})
    with pytest.raises(FormatError, match="of version 2"):
        Calibration(path)
    save_file({"a": torch.zeros(1)}, path, {"lora_compress.calibration": "1", "lora_compress.digests": "["})
    with pytest.raises(FormatError, match="is damaged"):
        Calibration(path)
    for moments, words in (
        (Moments(), "neither a gram nor a diagonal"),
        (Moments(torch.eye(3)), r"\(3, 3\) that does not fit rank 4"),
        (Moments(diagonal=torch.ones(3)), "3 second moments for 8 inputs"),
    ):
        with pytest.raises(FormatError, match=words):
            save_calibration(path, {"a": update}, {"a": moments})
    with pytest.raises(FormatError, match="b: moments of a module that the LoRA does not have"):
        save_calibration(path, {"a": update}, {"b": Moments(torch.eye(4))})
