"""Records what validation measures of a LoRA at several compressions on tiny-sd, noise and all: tests/core/data/history.json.

    python tools/record_history.py

The LoRA is random, with singular values falling as 1/i; the reference are pictures that it draws itself, so that its own distance
is the floor. Every entry is of 16 pictures from other noise.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
runpy.run_path(str(ROOT / "library" / "compress_torchvision.py"))["declare_missing_operators"]()

import torch  # noqa: E402

from lora_compress import CompressionSettings, LowRankUpdate, compress  # noqa: E402
from lora_compress.evaluation.attachment import Lora, attached  # noqa: E402
from lora_compress.evaluation.base_model import draw, load_base_model  # noqa: E402
from lora_compress.evaluation.extractors import load_extractor  # noqa: E402
from lora_compress.evaluation.frechet import frechet_distance  # noqa: E402
from lora_compress.evaluation.shapes import concept_prompts  # noqa: E402

COUNT, STEPS, REPEATS, RANK = 16, 4, 3, 16
LEVELS = [(ratio, bits) for ratio in (0.9, 0.6, 0.3) for bits in (8, 6, 4)]
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def random_updates(unet: torch.nn.Module, strength: float = 0.5) -> dict[str, LowRankUpdate]:
    """Updates of the attention layers, components falling as 1/i."""
    random, updates = torch.Generator().manual_seed(0), {}
    falling = (1.0 + torch.arange(RANK)).rsqrt()
    for name, layer in unet.named_modules():
        if name.endswith(LAYERS):
            out, inputs = layer.weight.shape
            down = torch.randn(RANK, inputs, generator=random) * falling.unsqueeze(1) / inputs**0.5
            up = torch.randn(out, RANK, generator=random) * falling * strength
            updates["lora_unet_" + name.replace(".", "_")] = LowRankUpdate(down, up, float(RANK))
    return updates


def main() -> None:
    pipeline, probe = load_base_model(ROOT / "assets" / "tiny-sd"), load_extractor("probe")
    updates, prompts = random_updates(pipeline.unet), concept_prompts(COUNT)

    def features(used: dict[str, LowRankUpdate], seed: int) -> torch.Tensor:
        with attached(pipeline, Lora("recorded", used, "sd1", {})):
            seeds = [1000 * seed + i for i in range(COUNT)]
            return probe(draw(pipeline, prompts, seeds=seeds, steps=STEPS, batch=COUNT))

    reference = torch.cat([features(updates, 100 + i) for i in range(2)])
    full = [frechet_distance(features(updates, seed), reference) for seed in range(REPEATS)]
    entries = []
    for ratio, bits in LEVELS:
        settings = CompressionSettings.parse({"rank_ratio": ratio, "bits": bits, "min_rank": 0})
        small = compress(updates, settings).updates
        for seed in range(REPEATS):
            value = frechet_distance(features(small, seed), reference)
            entry = {"rank_ratio": ratio, "bits": bits, "probe_fd": round(value, 3), "probe_fd_full": round(full[seed], 3)}
            entries.append(entry)
            print(entry, flush=True)
    path = ROOT / "tests" / "core" / "data" / "history.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
