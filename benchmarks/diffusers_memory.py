"""What a training step of `--host diffusers` takes in memory: with and without gradient checkpointing, by how the base is stored.

    python benchmarks/diffusers_memory.py [--pixels 256] [--json OUT.json]

Forward, backward and AdamW of a rank 16 LoRA on the full-size U-Net of SD 1.5, random weights in float32, batch 1, one caption that
is encoded already; each in a fresh process: the largest anonymous memory while the second step runs, what is allocated before it
included. No warning of torch's about reentrant checkpoints is let through. Needs 8 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

import torch  # noqa: E402
from measure import Goal, Run, answer, fresh, goal_table, random_weights, second_step  # noqa: E402

from library.compress_torchvision import declare_missing_operators  # noqa: E402

_STORED = (None, "int8", "nf4")
_TEXT = (1, 77, 768)


def build(base_quantize: str | None, checkpointing: bool, unet: Any) -> tuple[Any, Any]:
    """A denoiser of this U-Net as the trainer prepares it, and the optimizer of its LoRA."""
    from diffusers import DDPMScheduler

    from lora_compress.trainer.base import add_adapters
    from lora_compress.trainer.denoising import Denoiser
    from lora_compress.trainer.options import DEFAULTS, make_optimizer

    options = DEFAULTS | {"network_dim": 16, "network_alpha": 16, "unet_lr": 1e-4, "text_encoder_lr": 0}
    options |= {"base_quantize": base_quantize, "gradient_checkpointing": checkpointing}
    pipe = SimpleNamespace(components={"unet": unet}, unet=unet, scheduler=DDPMScheduler())
    denoiser = Denoiser(pipe, (0, 0))
    _, groups = add_adapters(denoiser, options, torch.device("cpu"))
    denoiser._known["a picture"] = (torch.randn(_TEXT),)
    return denoiser, make_optimizer("AdamW", groups)


def train_step(base_quantize: str | None, checkpointing: bool, pixels: int) -> dict[str, Any]:
    """Peak and processor time of a step, after one that warms up."""
    declare_missing_operators()
    from diffusers import UNet2DConditionModel

    warnings.filterwarnings("error", message=".*reentrant.*")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=_TEXT[-1])
    random_weights(unet)
    denoiser, optimizer = build(base_quantize, checkpointing, unet)
    latents = torch.randn(1, 4, pixels // 8, pixels // 8)

    def step() -> None:
        denoiser.loss(latents, ["a picture"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return second_step(step)


def table(runs: dict[tuple[str | None, bool], Run]) -> str:
    """A line for each way to store the base, with and without checkpoints."""
    first = runs[None, False].said
    lines = ["| base | gradient checkpointing | peak | of the first | processor time of the first |", "|---|---|---|---|---|"]
    for (stored, checkpointing), run in runs.items():
        ratio = f"{run.said['peak'] / first['peak']:.2f} | {run.said['seconds'] / first['seconds']:.2f}"
        lines.append(f"| {stored or 'float32'} | {'yes' if checkpointing else 'no'} | {run.said['peak'] / 1e6:,.0f} MB | {ratio} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    if answer({"step": train_step}, argv):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=256, help="width and height of the picture")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args(argv)
    runs = {
        (stored, checkpointing): fresh(
            Path(__file__), "step", base_quantize=stored, checkpointing=checkpointing, pixels=given.pixels
        )
        for stored in _STORED
        for checkpointing in (False, True)
    }
    print(table(runs))
    plain = runs[None, False].said["peak"]
    goals = [
        Goal("peak with checkpoints / without", 1.0, runs[None, True].said["peak"] / plain),
        Goal("peak on an int8 base with checkpoints / on a float32 base without", 1.0, runs["int8", True].said["peak"] / plain),
    ]
    print("\n" + goal_table(goals))
    if given.json:
        told = {f"{stored or 'float32'}{', checkpoints' if c else ''}": run.said for (stored, c), run in runs.items()}
        given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
