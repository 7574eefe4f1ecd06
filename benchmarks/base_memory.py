"""What storing the frozen base in 8 or 4 bits saves: bytes of the weights, and the peak of a full-size SD 1.5 training step.

    python benchmarks/base_memory.py [--no-step] [--json OUT.json]

Bytes are all parameters and buffers of the host's own model classes at full size, against fp16; exact, counted without weights.
The step is forward, backward and AdamW of a rank 16 LoRA (networks.lora, all modules of the U-Net) on random weights, a 64 x 64
picture (8 x 8 latents), batch 1, bf16 autocast, in a fresh process: the largest anonymous memory while it runs, what is allocated
before it included. Needs sd-scripts and 4 GB of memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

import torch  # noqa: E402
from measure import Goal, Run, answer, fresh, goal_table, random_weights, second_step  # noqa: E402

import networks.sd_scripts_path  # noqa: E402, F401  joins our packages with those of sd-scripts

# isort: split
from library.compress_base import BaseModelMixin  # noqa: E402
from lora_compress.frozen import WEIGHT_FORMATS, weight_bytes  # noqa: E402

_GOALS = {("SD 1.5", "int8"): 0.45, ("FLUX.1", "nf4"): 0.60}
_FORMATS = ("fp16", *WEIGHT_FORMATS)


class _Host:
    """Where the mixin finds what comes after it in a trainer."""

    def post_process_network(self, *arguments: Any) -> None:
        pass


class _Trainer(BaseModelMixin, _Host):
    pass


def pack(model: torch.nn.Module, name: str) -> None:
    """What `--base_quantize` does to a model, by the same hook; fp8 is our own, as on a CPU."""
    if name != "fp16":
        options = {"base_quantize": name, "load_8bit_text_encoder": False, "gradient_checkpointing": False}
        accelerator = SimpleNamespace(device=next(model.parameters()).device)
        _Trainer().post_process_network(argparse.Namespace(**options), accelerator, None, [], model)


def models() -> dict[str, Any]:
    """The host's models at full size, without weights, by name."""
    original_unet, flux_models = importlib.import_module("library.original_unet"), importlib.import_module("library.flux_models")
    sdxl_unet = importlib.import_module("library.sdxl_original_unet")
    return {
        "SD 1.5": lambda: original_unet.UNet2DConditionModel(64, 8, 768),
        "SDXL": sdxl_unet.SdxlUNet2DConditionModel,
        "FLUX.1": lambda: flux_models.Flux(flux_models.configs["dev"].params),
    }


def count_bytes() -> dict[str, dict[str, int]]:
    """Bytes of each model in each format."""
    found: dict[str, dict[str, int]] = {}
    for label, build in models().items():
        for name in _FORMATS:
            with torch.device("meta"):
                model = build().half()
            pack(model, name)
            found.setdefault(label, {})[name] = weight_bytes(model)
    return found


def train_step(name: str) -> dict[str, Any]:
    """One step of a LoRA on a full-size SD 1.5 U-Net of random weights in bf16, packed as `name`; one before it to warm up."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = models()["SD 1.5"]()
    random_weights(unet.to(torch.bfloat16).requires_grad_(False))
    network = importlib.import_module("networks.lora").create_network(1.0, 16, 16, None, [], unet)
    pack(unet, name)
    network.apply_to([], unet, False, True)
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    noisy, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 768)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = unet(noisy, torch.tensor([500]), text).sample.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {**second_step(step), "loras": len(network.unet_loras)}


def byte_table(found: dict[str, dict[str, int]]) -> str:
    """A line for each model: MB in each format, and the share that is gone."""
    lines = ["| frozen weights | " + " | ".join(_FORMATS) + " |", "|---" * (len(_FORMATS) + 1) + "|"]
    for label, sizes in found.items():
        cells = [
            f"{size / 1e6:,.0f} MB" + (f" (-{1 - size / sizes['fp16']:.1%})" if name != "fp16" else "")
            for name, size in sizes.items()
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_table(runs: dict[str, Run]) -> str:
    """A line for each format: the peak of the step and its processor time against the unpacked base's."""
    plain = runs["fp16"].said
    lines = ["| full-size SD 1.5 step | peak | of bf16's | processor time / bf16's |", "|---|---|---|---|"]
    for name, run in runs.items():
        label = "bf16" if name == "fp16" else name
        ratio = f"{run.said['peak'] / plain['peak']:.2f} | {run.said['seconds'] / plain['seconds']:.2f}"
        lines.append(f"| {label} | {run.said['peak'] / 1e6:,.0f} MB | {ratio} |")
    return "\n".join(lines)


def goals_of(found: dict[str, dict[str, int]], runs: dict[str, Run]) -> list[Goal]:
    """Shares of the bytes that are gone, and the peak of a step on an int8 base against one on a bf16 base."""
    goals = [
        Goal(
            f"{label}: share of the frozen weights' bytes that {name} saves",
            goal,
            1 - found[label][name] / found[label]["fp16"],
            True,
        )
        for (label, name), goal in _GOALS.items()
    ]
    if runs:
        ratio = runs["int8"].said["peak"] / runs["fp16"].said["peak"]
        goals.append(Goal("SD 1.5: peak of a step on an int8 base / on a bf16 base", 1.0, ratio))
    return goals


def main(argv: Sequence[str]) -> None:
    if answer({"step": train_step}, argv):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-step", action="store_true", help="count bytes only")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args(argv)
    found = count_bytes()
    print(byte_table(found))
    runs = {} if arguments.no_step else {name: fresh(Path(__file__), "step", name=name) for name in _FORMATS}
    if runs:
        print("\n" + step_table(runs))
    print("\n" + goal_table(goals_of(found, runs)))
    if arguments.json:
        said = {name: run.said for name, run in runs.items()}
        arguments.json.write_text(json.dumps({"bytes": found, "step": said}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
