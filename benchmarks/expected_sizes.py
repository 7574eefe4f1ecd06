"""What LoRA of usual models and ranks weigh under usual settings, told from shapes alone: the table of docs/recipes.md.

python benchmarks/expected_sizes.py [--ranks 16 32 64]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

from lora_files import MODELS  # noqa: E402

from lora_compress import CompressionSettings, LowRankUpdate, estimate_size  # noqa: E402

_SETTINGS: dict[str, dict[str, Any]] = {
    "fp16, as sd-scripts saves": {},
    "int8": {"bits": 8},
    "half of the components, int8": {"rank_ratio": 0.5, "bits": 8},
    "half, int4": {"rank_ratio": 0.5, "bits": 4},
    "half, entropy at 3 bits": {"rank_ratio": 0.5, "strategy": "entropy", "bits": 3},
    "a quarter, entropy at 3 bits": {"rank_ratio": 0.25, "min_rank": 1, "strategy": "entropy", "bits": 3},
}
_TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL", "flux": "FLUX.1"}


def modules_of(model: str, rank: int) -> dict[str, LowRankUpdate]:
    """The modules of a LoRA without their weights."""
    return {
        name: LowRankUpdate(
            torch.empty(rank, inputs, *kernel, device="meta"),
            torch.empty(outputs, rank, *(1,) * len(kernel), device="meta"),
            float(rank),
        )
        for name, inputs, outputs, kernel in MODELS[model]()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32])
    ranks = parser.parse_args().ranks
    columns = [(model, rank) for model in _TITLES for rank in ranks]
    print("| MB | " + " | ".join(f"{_TITLES[model]}, rank {rank}" for model, rank in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, values in _SETTINGS.items():
        settings = CompressionSettings.parse(values)
        sizes = (estimate_size(modules_of(model, rank), settings, torch.float16) for model, rank in columns)
        print(f"| {name} | " + " | ".join(f"{size / 1e6:.3g}" for size in sizes) + " |")


if __name__ == "__main__":
    main()
