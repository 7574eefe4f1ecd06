"""The balanced form: dW as it was, optimizer state as if training had begun there, rows without a use ready to learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_compress import LowRankUpdate
from lora_compress.training.optimizer_state import clear_state, rotate_state
from lora_compress.training.pairs import Pair
from lora_compress.training.rotation import balanced_rotation
from tests.core.factories import dense, random_update


def deficient(rank: int, used: int, scale: float = 0.5, kernel: tuple[int, ...] = ()) -> LowRankUpdate:
    """An update of rank `used` in factors of `rank`."""
    update = random_update(rank, 10, 30, kernel=kernel, alpha=scale * rank, seed=3)
    mix = torch.randn(used, rank, generator=torch.Generator().manual_seed(4)) if used else torch.zeros(1, rank)
    up = update.up_matrix[:, : max(used, 1)] @ mix
    return LowRankUpdate(update.down, up.reshape(update.up.shape), update.alpha)


@pytest.mark.parametrize("used", [0, 1, 5, 8])
@pytest.mark.parametrize("scale", [0.5, 1.0, -2.0])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_update_is_unchanged_in_float64(used: int, scale: float, kernel: tuple[int, ...]) -> None:
    update = deficient(8, used, scale, kernel) if used < 8 else random_update(8, 10, 30, kernel=kernel, alpha=8 * scale)
    rotation = balanced_rotation(update)
    down = rotation.down_map @ update.down_matrix.double()
    up = update.up_matrix.double() @ rotation.up_map.T
    assert torch.allclose(scale * up @ down, dense(update), rtol=0, atol=1e-10 * max(1.0, float(dense(update).norm())))
    assert torch.allclose(rotation.down_map @ rotation.up_map.T, torch.eye(8, dtype=torch.float64), atol=1e-9)
    reference = torch.linalg.svdvals(dense(update))[:8]
    assert torch.allclose(rotation.scores[: len(reference)], reference, atol=1e-5 * float(reference[0]) + 1e-12)
    norms = down.norm(dim=1), up.norm(dim=0)
    assert torch.allclose(norms[0][:used], norms[1][:used], rtol=1e-6)
    assert (norms[0] > 0.1).all()  # what adds nothing can still learn: up's rows get a gradient through down's


def test_more_components_than_a_layer_has_inputs() -> None:
    update = random_update(12, 5, 30)
    rotation = balanced_rotation(update)
    down, up = rotation.down_map @ update.down_matrix.double(), update.up_matrix.double() @ rotation.up_map.T
    assert torch.allclose(up @ down, dense(update), atol=1e-9)
    assert (rotation.scores[5:] == 0).all()


def test_weighted_by_activations_the_first_components_are_the_best_for_the_outputs() -> None:
    update = random_update(6, 20, 30, seed=1)
    inputs = torch.randn(4000, 20, dtype=torch.float64) * torch.logspace(0, -2, 20, dtype=torch.float64)
    reached = inputs @ update.down_matrix.double().T
    rotation = balanced_rotation(update, reached.T @ reached / len(inputs))
    down, up = rotation.down_map @ update.down_matrix.double(), update.up_matrix.double() @ rotation.up_map.T
    assert torch.allclose(up @ down, dense(update), atol=1e-8)
    outputs = inputs @ dense(update).T
    best = torch.linalg.svdvals(outputs) / len(inputs) ** 0.5
    assert torch.allclose(rotation.scores, best[:6], rtol=1e-4)


class Factors(nn.Module):
    """y = scale * up(down(x)), float64, and the pair of its layers."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(down.shape[1], len(down), bias=False).double()
        self.up = nn.Linear(len(down), up.shape[0], bias=False).double()
        self.down.weight.data, self.up.weight.data = down.clone(), up.clone()
        self.pair = Pair("pair", self.down, self.up, 0.5)

    def loss(self, seed: int) -> torch.Tensor:
        x = torch.randn(16, self.down.in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (self.up(self.down(x)) * 0.5 - x.roll(1, dims=1)[:, : self.up.out_features]).square().mean()


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.0),
    "AMSGrad": lambda parameters: torch.optim.Adam(parameters, lr=0.0, amsgrad=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_averages_of_gradients_are_those_of_a_training_that_began_in_the_rotated_basis(name: str) -> None:
    update = random_update(5, 12, 9, alpha=2.5, dtype=torch.float64)
    rotation = balanced_rotation(update)
    before = Factors(update.down, update.up)
    after = Factors(rotation.down_map @ update.down, update.up @ rotation.up_map.T)
    states = []
    for factors in (before, after):
        optimizer = OPTIMIZERS[name](factors.parameters())
        for seed in range(4):
            optimizer.zero_grad()
            factors.loss(seed).backward()
            optimizer.step()
        states.append(optimizer)
    for side, map_ in enumerate((rotation.up_map, rotation.down_map)):
        rotate_state(states[0], before.pair, side, map_)
        moved, expected = (states[i].state[pair.weights[side]] for i, pair in enumerate((before.pair, after.pair)))
        for key in ("exp_avg", "momentum_buffer"):
            if key in expected:
                assert torch.allclose(moved[key], expected[key], rtol=1e-9, atol=1e-12)
        assert all(bool((value >= 0).all()) for key, value in moved.items() if key.endswith("_sq"))


def test_squared_averages_follow_a_permutation_exactly() -> None:
    factors = Factors(torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64))
    optimizer = torch.optim.Adam(factors.parameters(), lr=0.1)
    factors.loss(0).backward()
    optimizer.step()
    before = optimizer.state[factors.down.weight]["exp_avg_sq"].clone()
    rotate_state(optimizer, factors.pair, 0, torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]] * -3.0)
    assert torch.allclose(optimizer.state[factors.down.weight]["exp_avg_sq"], 9.0 * before[[2, 0, 3, 1]])


def test_state_that_is_not_known_is_begun_anew_and_a_cleared_component_does_not_move() -> None:
    factors = Factors(torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64))
    optimizer = torch.optim.Adagrad(factors.parameters(), lr=0.1)
    factors.loss(0).backward()
    optimizer.step()
    rotate_state(optimizer, factors.pair, 0, torch.eye(4, dtype=torch.float64))
    assert factors.down.weight not in optimizer.state and factors.up.weight in optimizer.state

    adam = torch.optim.Adam(factors.parameters(), lr=0.1)
    adam.step()
    masked = torch.tensor([False, True, False, True])
    for side, weight in enumerate(factors.pair.weights):
        clear_state(adam, factors.pair, side, masked)
        factors.pair.fill(side, weight.grad, masked, 0.0)
    before = factors.up.weight.detach().clone()
    adam.step()
    still = (factors.up.weight == before).all(dim=0)
    assert torch.equal(still, masked)
