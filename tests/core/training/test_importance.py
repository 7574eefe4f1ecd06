"""Scores, masks and the entropy grid as pure functions, against loops written out by hand."""

from __future__ import annotations

import pytest
import torch

from lora_compress import PruningSettings
from lora_compress.pruning import select_ranks
from lora_compress.quantization.entropy.fake import EntropyFakeQuantizer
from lora_compress.training.importance import component_sensitivity, rotate_averages, update_gram, update_sensitivity
from lora_compress.training.masks import choose_masks


def test_sensitivity_is_adaloras_for_whole_components() -> None:
    generator = torch.Generator().manual_seed(0)
    averages = torch.zeros(2, 3)
    smoothed, uncertainty = [0.0] * 3, [0.0] * 3
    for _ in range(5):
        down, up, down_grad, up_grad = (torch.randn(3, n, generator=generator) for n in (4, 6, 4, 6))
        update_sensitivity(averages, component_sensitivity((down, up), (down_grad, up_grad)))
        for i in range(3):
            value = sum(abs(float(w * g)) for w, g in zip(down[i], down_grad[i], strict=True)) / 4
            value += sum(abs(float(w * g)) for w, g in zip(up[i], up_grad[i], strict=True)) / 6
            smoothed[i] = 0.85 * smoothed[i] + 0.15 * value
            uncertainty[i] = 0.85 * uncertainty[i] + 0.15 * abs(value - smoothed[i])
    assert averages[0].tolist() == pytest.approx(smoothed, rel=1e-5)
    assert averages[1].tolist() == pytest.approx(uncertainty, rel=1e-5)


def test_averages_follow_a_permutation_and_spread_in_a_mixture() -> None:
    averages = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0]])
    order = torch.eye(3, dtype=torch.float64)[[2, 0, 1]]
    moved = averages.clone()
    rotate_averages(moved, order * -2.0, order * -0.5)
    assert torch.equal(moved, averages[:, [2, 0, 1]])
    half = torch.tensor([[0.5**0.5, 0.5**0.5, 0.0], [-(0.5**0.5), 0.5**0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    rotate_averages(averages, half, half)
    assert torch.allclose(averages, torch.tensor([[1.5, 1.5, 4.0], [4.0, 4.0, 7.0]]))


def test_a_gram_matrix_is_the_mean_over_the_first_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    gram, count = torch.zeros(3, 3), torch.zeros(1)
    batches = [torch.randn(10, 3, generator=generator) for _ in range(6)]
    for rows in batches:
        update_gram(gram, count, rows)
    every = torch.cat(batches)
    assert torch.allclose(gram, every.T @ every / 60, atol=1e-6)


SCORES = {"a": torch.tensor([1.0, 9.0, 3.0, 0.5]), "b": torch.tensor([2.0, 0.1]), "c": torch.tensor([4.0, 8.0, 0.2])}


@pytest.mark.parametrize(
    "settings",
    [
        PruningSettings(rank_ratio=0.4, min_rank=0),
        PruningSettings(rank_ratio=0.4, min_rank=1),
        PruningSettings(new_rank=1),
        PruningSettings(norm_threshold=2.5, min_rank=0),
        PruningSettings(dynamic_method="energy", dynamic_param=0.9),
        PruningSettings(layer_threshold=0.05, min_rank=0),
    ],
    ids=lambda settings: f"{settings.rank_ratio} {settings.new_rank} {settings.dynamic_method} {settings.layer_threshold}",
)
def test_masks_end_where_files_do_and_get_there_by_the_weakest(settings: PruningSettings) -> None:
    ranks = select_ranks({name: score.sort(descending=True).values for name, score in SCORES.items()}, settings)
    goal = sum(ranks.values())
    before = {name: torch.ones(len(score), dtype=torch.bool) for name, score in SCORES.items()}
    for above in (1.0, 0.6, 0.3, 0.0):
        masks = choose_masks(SCORES, settings, above)
        assert sum(int(mask.sum()) for mask in masks.values()) == goal + int((9 - goal) * above)
        for name, mask in masks.items():
            assert not (mask & ~before[name]).any()  # with the same scores nothing returns
            strongest = SCORES[name].sort(descending=True).values[: ranks[name]]
            assert all(bool(mask[SCORES[name] == value]) for value in strongest)
        before = masks
    assert {name: int(mask.sum()) for name, mask in before.items()} == ranks


@pytest.mark.parametrize("bits", [1.0, 2.5, 4.0, 7.0])
def test_the_step_of_the_entropy_grid_meets_its_bits(bits: float) -> None:
    generator = torch.Generator().manual_seed(2)
    falling = torch.exp(-0.3 * torch.arange(12)).unsqueeze(1)
    rows = {
        name: [torch.randn(12, n, generator=generator) * falling * s for n in (300, 500)] for name, s in (("a", 0.1), ("b", 0.03))
    }
    grid = EntropyFakeQuantizer(bits)
    grid.prepare(rows, torch.zeros(6))
    size = 0
    for name, parts in rows.items():
        found = grid.choose(parts)
        projected = tuple(grid.project(part, own, (name, side)) for side, (part, own) in enumerate(zip(parts, found, strict=True)))
        _, parameters, chunks = grid.encode((projected[0], projected[1]), (found[0], found[1]))
        size += sum(map(len, chunks))
        assert parameters["step"] == float(found[0][0, 5])
        assert all(
            torch.equal(grid.project(part, own, name + str(side)), part)
            for side, (part, own) in enumerate(zip(projected, found, strict=True))
        )
    assert size * 8 / (2 * 12 * 800) == pytest.approx(bits, rel=0.08)
