"""Run by torchrun: train on one rank's half of every batch, or alone on all of it, and save what came of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from nets import Net, batch  # beside this script: torch-fidelity installs a package `tests` of its own

from lora_compress import CompressionSettings
from lora_compress.training import TrainingSession


def main(folder: Path, settings: dict[str, object], steps: int) -> None:
    """Gradients are averaged over ranks as sd-scripts does it: after backward, parameter by parameter."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world > 1:
        dist.init_process_group("gloo")
    assert world == 1 or dist.get_world_size() == 2
    net = Net(rank=5)
    optimizer = torch.optim.SGD(net.parameters_of_pairs(), lr=0.2, momentum=0.9)
    session = TrainingSession(net.pairs(), CompressionSettings.parse(settings), steps)
    for step in range(steps):
        x, y = batch(step)
        half = len(x) // world
        mine = slice(rank * half, (rank + 1) * half)
        optimizer.zero_grad()
        (net(x[mine]) - y[mine]).square().mean().backward()
        for parameter in net.parameters_of_pairs() if world > 1 else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world  # type: ignore[operator]
        optimizer.step()
    assert session.step == steps
    weights = {f"{name}.{side}": w.detach() for name, pair in net.pairs().items() for side, w in enumerate(pair.weights)}
    dense = {name: pair.update().dense() for name, pair in net.pairs().items()}
    torch.save({"weights": weights, "state": session.state.state_dict(), "dense": dense}, folder / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
