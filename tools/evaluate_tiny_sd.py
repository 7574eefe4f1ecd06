"""Measures tiny-sd: how often the probe reads in its pictures what their captions say; exits with 1 where that is too seldom.

python tools/evaluate_tiny_sd.py            # 256 captions, 25 DDIM steps, guidance 4; draws docs/images/tiny_sd.png
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from library.compress_torchvision import declare_missing_operators  # noqa: E402

declare_missing_operators()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from tiny_sd.pictures import draw_pictures, sample_drawings, to_unit  # noqa: E402
from tiny_sd.probe import label_drawings  # noqa: E402

from lora_compress.evaluation.probe import HEADS, Probe, load_probe  # noqa: E402
from lora_compress.evaluation.shapes import Drawing, caption, concept_prompts  # noqa: E402

PICTURES_REQUIRED = 0.85  # of tiny-sd's pictures read right, for each of shape, colour and background
PROBE_REQUIRED = 0.98  # of real pictures read right, for each head
CONCEPT_ALLOWED = 0.10  # of tiny-sd's pictures may show the concept that a LoRA is to teach
CONCEPT = {"texture": "striped", "shape": "star"}


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """tiny-sd in fp32 on the CPU, without progress bars."""
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_prompts(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 25,
    guidance: float = 4.0,
    seed: int = 0,
    batch: int = 32,
) -> torch.Tensor:
    """One picture per prompt: (N, 3, 64, 64) floats in [0, 1]; picture i depends on the seed and i alone, whatever the batch."""
    noise = torch.stack(
        [torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed * 100_003 + i)) for i in range(len(prompts))]
    )
    pictures = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        drawn = pipeline(
            list(prompts[part]), num_inference_steps=steps, guidance_scale=guidance, latents=noise[part], output_type="pt"
        )  # fmt: skip
        pictures.append(drawn.images.float())
    return torch.cat(pictures)


def probe_accuracy(probe: Probe, count: int, seed: int) -> dict[str, float]:
    """Share of fresh real pictures, all textures, that each head reads right."""
    drawings = sample_drawings(count, np.random.default_rng([seed, 77]), texture=None)
    read, labels = probe.classify(to_unit(draw_pictures(drawings))), label_drawings(drawings)
    return {name: float((read[name] == labels[name]).float().mean()) for name in HEADS}


def picture_accuracy(probe: Probe, pictures: torch.Tensor, drawings: list[Drawing]) -> dict[str, float]:
    """Share of pictures (N, 3, 64, 64) that each head reads as drawn; the last entry: shape, colour and background at once."""
    read, labels = probe.classify(pictures), label_drawings(drawings)
    right = {name: read[name] == labels[name] for name in HEADS}
    right["all three"] = right["shape"] & right["colour"] & right["background"]
    return {name: float(hits.float().mean()) for name, hits in right.items()}


def concept_share(probe: Probe, pictures: torch.Tensor) -> float:
    """Share of pictures (N, 3, 64, 64) in which the probe reads the concept."""
    read = probe.classify(pictures)
    return float(torch.stack([read[head] == HEADS[head].index(value) for head, value in CONCEPT.items()]).all(dim=0).float().mean())


def label_grid(pictures: torch.Tensor, labels: Sequence[str], columns: int = 8) -> Image.Image:
    """Pictures (N, 3, 64, 64) at double size with their captions, wrapped, below them."""
    cell, text = 136, 44
    rows = -(-len(labels) // columns)
    grid = Image.new("RGB", (columns * cell + 8, rows * (cell + text) + 8), (255, 255, 255))
    draw = ImageDraw.Draw(grid)
    for index, label in enumerate(labels):
        left, top = index % columns * cell + 8, index // columns * (cell + text) + 8
        pixels = (pictures[index].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        grid.paste(Image.fromarray(pixels).resize((128, 128), Image.Resampling.NEAREST), (left, top))
        draw.rectangle((left - 1, top - 1, left + 128, top + 128), outline=(200, 200, 200))
        draw.multiline_text((left, top + 130), _wrap(label), fill=(40, 40, 40), font_size=10, spacing=1)
    return grid


def _wrap(label: str, width: int = 24) -> str:
    lines = [""]
    for word in label.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "tiny-sd")
    parser.add_argument("--count", type=int, default=256, help="how many captions to draw")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, default=ROOT / "docs" / "images" / "tiny_sd.png", help="the picture to write")
    args = parser.parse_args()

    probe, pipeline = load_probe(args.model), load_pipeline(args.model)
    generator = np.random.default_rng([args.seed, 88])
    drawings = sample_drawings(args.count, generator)
    prompts = [caption(drawing, generator, complete=True) for drawing in drawings]
    pictures = draw_prompts(pipeline, prompts, steps=args.steps, guidance=args.guidance, seed=args.seed)
    concept = draw_prompts(
        pipeline, concept_prompts(64, args.seed, **CONCEPT), steps=args.steps, guidance=args.guidance, seed=args.seed + 1
    )
    real = probe_accuracy(probe, 2048, args.seed)
    drawn = picture_accuracy(probe, pictures, drawings)
    share = concept_share(probe, concept)
    print("probe on 2048 real pictures:  " + ", ".join(f"{name} {value:.1%}" for name, value in real.items()))
    print(f"tiny-sd on {args.count} captions:      " + ", ".join(f"{name} {value:.1%}" for name, value in drawn.items()))
    print(f"tiny-sd asked for a striped star shows one in {share:.1%} of 64 pictures")
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    label_grid(pictures[:32], prompts[:32]).save(args.grid, optimize=True)
    good = (
        min(real.values()) >= PROBE_REQUIRED
        and min(drawn[name] for name in ("shape", "colour", "background")) >= PICTURES_REQUIRED
        and share <= CONCEPT_ALLOWED
    )
    print(
        "good"
        if good
        else f"not good enough: {PROBE_REQUIRED:.0%}, {PICTURES_REQUIRED:.0%} and {CONCEPT_ALLOWED:.0%} are asked for"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
