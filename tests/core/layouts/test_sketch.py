"""Matrices too large to be decomposed whole: the strongest components, and an error that counts what they leave out."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from core.layouts.files import dense, save
from safetensors.torch import load_file

from lora_compress import CompressionSettings, FormatError, compress_file
from lora_compress.inspection.comparison import compare_files
from lora_compress.inspection.file import inspect_file
from lora_compress.layouts.sketch import MOST_COMPONENTS, strongest_components
from lora_compress.parallel import stop_if_cancelled, stream_batches
from lora_compress.sources.open import open_lora

KEY = "lora_unet_mid_block_attentions_0_proj_in"
SIDES = (2080, 2056)


def matrix(rank: int, noise: float, sides: tuple[int, int] = SIDES) -> torch.Tensor:
    torch.manual_seed(3)
    weak = noise * torch.randn(*sides) if noise else torch.zeros(*sides)
    return torch.randn(sides[0], rank) @ torch.randn(rank, sides[1]) * 1e-3 + weak


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e25])
def test_the_strongest_components_and_what_they_leave_out(magnitude: float) -> None:
    whole = matrix(30, 1e-3, (700, 640)).double() * magnitude
    u, sigma, vh, rest = strongest_components(whole)
    exact = torch.linalg.svdvals(whole)
    assert torch.allclose(sigma[:30], exact[:30], rtol=1e-6, atol=0.0)
    assert torch.allclose(u.T @ u, torch.eye(MOST_COMPONENTS, dtype=torch.float64), atol=1e-9)
    assert rest == pytest.approx(float((whole - u * sigma @ vh).square().sum()), rel=1e-6)
    assert rest <= 1.05 * float(exact[MOST_COMPONENTS:].square().sum())
    again = strongest_components(whole)
    assert torch.equal(again[0], u) and torch.equal(again[2], vh)


def test_a_large_difference_of_low_rank_is_read_exactly(tmp_path: Path) -> None:
    change = matrix(40, 0.0)
    with open_lora(save({f"{KEY}.diff": change}, tmp_path)) as source:
        update = source[KEY]
        assert 40 <= update.rank <= source.shapes[KEY].rank == MOST_COMPONENTS
        assert update.rest == 0.0
        assert float((dense(update) - change).norm() / change.norm()) < 3e-6


def test_the_error_of_a_large_difference_counts_what_was_not_read(tmp_path: Path) -> None:
    change = matrix(16, 2e-4)
    source, target = save({f"{KEY}.diff": change}, tmp_path), tmp_path / "out.safetensors"
    report = compress_file(source, target, CompressionSettings.parse({"new_rank": 8}))
    factors = {key.removeprefix(KEY): tensor.double() for key, tensor in load_file(target).items()}
    made = factors[".lora_up.weight"] @ factors[".lora_down.weight"] * factors[".alpha"] / len(factors[".lora_down.weight"])
    truth = float((made - change.double()).norm() / change.double().norm())
    assert report.relative_error == pytest.approx(truth, rel=1e-5)
    assert "no more components are read" in " ".join(report.notes)
    inspected = inspect_file(source)
    left_out = inspected.modules[0].rest ** 0.5 / float(change.norm())
    assert min(error for _, error in (*report.curve, *inspected.curve, *inspected.packed_curve)) >= left_out > 0.03
    compared = compare_files(source, target)
    assert compared.relative_error == pytest.approx(truth, rel=1e-5)
    assert compare_files(source, source).relative_error == 0.0


def test_two_large_differences_are_not_said_to_be_closer_than_is_known(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
    first, second = (save({f"{KEY}.diff": matrix(number, 1e-3)}, tmp_path / str(number)) for number in (1, 2))
    with pytest.raises(FormatError, match=f"{KEY}: is in both files a full difference so large"):
        compare_files(first, second)


def test_an_interrupted_caller_does_not_wait_for_long_work() -> None:
    begun, ended = threading.Event(), threading.Event()

    def long(names: object) -> dict[str, int]:
        begun.set()
        try:
            while not ended.wait(0.001):
                stop_if_cancelled()
        finally:
            ended.set()
        return {}

    def work(names: tuple[str, ...]) -> dict[str, int]:
        if "last" in names:
            return long(names)
        assert begun.wait(30)
        return dict.fromkeys(names, 1)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = stream_batches(work, ["first", "last"])
        assert next(results) == ("first", 1)
        results.close()  # as an exception in the loop over it does
    finally:
        torch.set_num_threads(before)
    assert ended.is_set()
