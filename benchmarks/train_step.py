"""What masks and quantization-aware training add to a training step of sd-scripts' networks.lora.

    python benchmarks/train_step.py [--size 64] [--rank 16] [--rounds 8] [--steps 2] [--narrow] [--device cpu] [--json OUT.json]

A U-Net of sd-scripts' own SD1.x class at full size (--narrow: 32 to 64 channels) with random weights, one picture of `size` pixels:
forward, backward, AdamW. All networks sit on the same U-Net in turns, some steps each, as many rounds as asked; what is told is the
median over the rounds of the ratio to networks.lora in the same round, and the extra bytes that stay.

    int4, nf4   half of the components masked, weights quantized in the forward pass; a search for scales is timed apart and shared
                out over the qat_refresh steps that it serves
    waiting     a session before anything is due
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

from measure import Goal, goal_table  # noqa: E402

import networks.sd_scripts_path  # noqa: E402, F401

_GOALS = {"int4": 1.15, "nf4": 1.3, "waiting": 1.02}
_ACTIVE = {"iterative_pruning": "True", "rank_ratio": "0.5", "min_rank": "0", "max_iterations": "1"}
_ACTIVE |= {"pruning_start": "0", "pruning_end": "1e-9", "qat": "True", "qat_start": "0"}
_ARGUMENTS = {
    "lora": {},
    "int4": {**_ACTIVE, "bits": "4"},
    "nf4": {**_ACTIVE, "bits": "4", "strategy": "nf4"},
    "waiting": {"qat": "True", "bits": "4", "qat_start": "0.99"},
}
_TOTAL = 10**6  # steps of the training that is imagined: far from its end
_NARROW = {"BLOCK_OUT_CHANNELS": (32, 32, 64, 64), "TIMESTEP_INPUT_DIM": 32, "TIME_EMBED_DIM": 128}


class Variant:
    """A network on the U-Net, which can be put on and taken off, and its optimizer."""

    def __init__(self, name: str, unet: Any, rank: int) -> None:
        module = importlib.import_module("networks.lora" if name == "lora" else "networks.lora_compress")
        torch.manual_seed(0)
        encoder = torch.nn.Identity()
        self.network = module.create_network(1.0, rank, rank, None, encoder, unet, neuron_dropout=None, **_ARGUMENTS[name])
        if name != "lora":
            self.network._args = argparse.Namespace(max_train_steps=_TOTAL)
        self.network.apply_to(encoder, unet, False, True)
        self.network.to(unet.device).requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        self.unet = unet
        self.off()

    def on(self) -> None:
        """Take part in the U-Net's forward."""
        for lora in self.network.unet_loras:
            lora.org_forward.__self__.forward = lora.forward

    def off(self) -> None:
        """Leave the U-Net as it was."""
        for lora in self.network.unet_loras:
            lora.org_forward.__self__.__dict__.pop("forward", None)

    def step(self, size: int) -> None:
        """One training step on a random picture."""
        device, width = self.unet.device, self.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.in_features
        noisy, text = torch.randn(1, 4, size // 8, size // 8, device=device), torch.randn(1, 77, width, device=device)
        loss = self.unet(noisy, torch.tensor([500], device=device), text).sample.square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, size: int, steps: int) -> float:
        """Of so many steps: on a CPU those of the processors, which other programs on the machine hardly touch."""
        self.on()
        begun = _now(self.unet.device)
        for _ in range(steps):
            self.step(size)
        ended = _now(self.unet.device)
        self.off()
        return ended - begun

    def search_seconds(self) -> float:
        """Of one search for the scales of all modules; none follows in the steps that are timed."""
        session = self.network.session
        assert session.quantizing and session.any_masked
        session.timeline = replace(session.timeline, frozen=0)
        begun = _now(self.unet.device)
        session.choose_grids()
        return _now(self.unet.device) - begun


def make_unet(narrow: bool, device: str) -> Any:
    """sd-scripts' U-Net of SD1.x with the weights that torch gives it, frozen."""
    module = importlib.import_module("library.original_unet")
    before = {name: getattr(module, name) for name in _NARROW}
    try:
        for name, value in _NARROW.items() if narrow else ():
            setattr(module, name, value)
        unet = module.UNet2DConditionModel(8, 8, 32) if narrow else module.UNet2DConditionModel(8, 64, 768)
    finally:
        for name, value in before.items():
            setattr(module, name, value)
    return unet.to(device).requires_grad_(False).eval()


def measure_steps(narrow: bool, size: int, rank: int, rounds: int, steps: int, device: str) -> dict[str, Any]:
    """Median ratios to networks.lora, its median seconds for a step, and bytes of the session's buffers."""
    unet = make_unet(narrow, device)
    variants = {name: Variant(name, unet, rank) for name in _ARGUMENTS}
    for variant in variants.values():  # begins pruning and quantization, and warms up
        variant.seconds(size, 3)
    searches = {name: variants[name].search_seconds() for name in ("int4", "nf4")}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        order = list(variants) if turn % 2 == 0 else list(reversed(variants))
        for name in order:
            times[name].append(variants[name].seconds(size, steps) / steps)
    ratios = {name: statistics.median(own / base for own, base in zip(times[name], times["lora"], strict=True)) for name in _GOALS}
    parameters = sum(p.numel() * p.element_size() for p in variants["lora"].network.parameters())
    state = {
        name: sum(b.numel() * b.element_size() for b in v.network.session.state.buffers())
        for name, v in variants.items()
        if name != "lora"
    }
    return {
        "ratios": ratios,
        "search_seconds": searches,
        "seconds": statistics.median(times["lora"]),
        "parameter_bytes": parameters,
        "state_bytes": state,
    }


def _now(device: torch.device) -> float:
    """Seconds: of the processors, or of the clock when a GPU has done what it was asked for."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps of each network in a round")
    parser.add_argument("--narrow", action="store_true", help="a U-Net of 32 to 64 channels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure_steps(args.narrow, args.size, args.rank, args.rounds, args.steps, args.device)
    kind = "s" if args.device.startswith("cuda") else "CPU seconds"
    print(f"a step of networks.lora takes {found['seconds']:.3f} {kind}; its weights {found['parameter_bytes'] / 1e6:.2f} MB")
    for name, seconds in found["search_seconds"].items():
        print(f"{name}: a search for all scales takes {seconds:.3f} {kind}")
    for name, count in found["state_bytes"].items():
        print(f"{name}: {count / 1e6:.3f} MB stay in memory besides, {count / found['parameter_bytes']:.2%} of the weights")
    goals = [Goal(f"a step with {name} / of networks.lora", _GOALS[name], ratio) for name, ratio in found["ratios"].items()]
    print(goal_table(goals))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
