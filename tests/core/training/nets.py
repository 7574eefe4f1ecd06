"""Small networks of frozen layers with trainable pairs beside them, made of plain torch layers, and loops that train them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_compress.training import Pair


class Adapted(nn.Module):
    """org(x) + scale * up(down(x))."""

    def __init__(self, org: nn.Module, down: nn.Module, up: nn.Module, scale: float) -> None:
        super().__init__()
        self.org, self.down, self.up, self.scale = org, down, up, scale
        self.org.requires_grad_(False)
        nn.init.zeros_(up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.org(x) + self.up(self.down(x)) * self.scale


class Net(nn.Module):
    """A convolution and two linear layers on 4 x 4 pictures of 3 channels, rank `rank`, scale 1/2."""

    def __init__(self, rank: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        scale = 0.5
        self.conv = Adapted(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.Conv2d(3, rank, 3, padding=1, bias=False),
            nn.Conv2d(rank, 12, 1, bias=False),
            scale,
        )
        self.first = Adapted(nn.Linear(12, 70), nn.Linear(12, rank, bias=False), nn.Linear(rank, 70, bias=False), scale)
        self.second = Adapted(nn.Linear(70, 5), nn.Linear(70, rank, bias=False), nn.Linear(rank, 5, bias=False), scale)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean(dim=(2, 3))
        return self.second(torch.relu(self.first(x)))

    def pairs(self) -> dict[str, Pair]:
        layers = {"conv": self.conv, "first": self.first, "second": self.second}
        return {name: Pair(name, layer.down, layer.up, layer.scale) for name, layer in layers.items()}

    def parameters_of_pairs(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and what a fixed teacher makes of them."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 3, 4, 4, generator=generator)
    teacher = torch.randn(3, 5, generator=torch.Generator().manual_seed(7)) * 3
    return x, torch.tanh(x.mean(dim=(2, 3)) @ teacher)


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    between: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Losses of the steps; `between` is called after each."""
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        between(step)
    return losses


def loss_of(net: nn.Module) -> float:
    """On a batch of its own."""
    x, y = batch(-1, 64)
    with torch.no_grad():
        return float((net(x) - y).square().mean())
