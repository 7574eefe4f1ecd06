"""Run by torchrun: train on one rank's half of every batch, or alone on all of it, and save what came of it.

With a third argument 1 or 2, DeepSpeed trains with that stage of ZeRO.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nets import Net, batch  # beside this script: torch-fidelity installs a package `tests` of its own

from lora_compress import CompressionSettings
from lora_compress.training import TrainingSession


def main(folder: Path, settings: dict[str, object], steps: int, stage: int) -> None:
    """Gradients are averaged over ranks as sd-scripts does it: after backward, parameter by parameter."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if stage:
        import deepspeed

        deepspeed.init_distributed("gloo")
    elif world > 1:
        dist.init_process_group("gloo")
    assert world == 1 or dist.get_world_size() == 2
    net = Net(rank=5)
    optimizer = make_optimizer(settings, net)
    session = TrainingSession(net.pairs(), CompressionSettings.parse(settings), steps)
    engine = engine_of(net, optimizer, stage) if stage else None
    for step in range(steps):
        x, y = batch(step)
        half = len(x) // world
        mine = slice(rank * half, (rank + 1) * half)
        if engine is not None:
            engine.backward((engine(x[mine]) - y[mine]).square().mean())
            engine.step()
            continue
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


def make_optimizer(settings: dict[str, Any], net: Net) -> torch.optim.Optimizer:
    """AdamW, with settings that are none of a session's."""
    parameters = list(net.parameters_of_pairs())
    if settings.pop("adam", False):  # two groups, as text encoder and U-Net are
        return torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.02}], lr=0.01)
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def engine_of(net: Net, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """DeepSpeed's, in float32."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    engine, held, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    assert type(held).__name__ == "DeepSpeedZeroOptimizer"
    return engine


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
