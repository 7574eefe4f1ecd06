"""What the benchmarks of trainings share: tiny-sd learns the striped star as a user trains, and files are scored by pictures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "tools")]

__all__ = ["compress", "score", "share", "train"]

_HELD_OUT = 512  # pictures of the concept that nobody trained on
_OTHER_NOISE = 1000  # added to the seed of pictures


def train(folder: Path, name: str, seed: int, steps: int, flags: Sequence[str]) -> Path:
    """Train with config/demo.toml through train_network_ext.py, on one thread, unless the file is there already."""
    target = folder / f"{name}.safetensors"
    if target.exists():
        return target
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process=1"]
    paths = [f"--train_data_dir={folder / 'data'}", f"--output_dir={folder}", f"--output_name={name}"]
    command = [*launch, "train_network_ext.py", "--config_file=config/demo.toml", *paths, f"--seed={seed}"]
    done = subprocess.run([*command, f"--max_train_steps={steps}", *flags], cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: training {name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return target


def compress(source: str, target: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Compress a finished file."""
    from lora_compress import CompressionSettings
    from lora_compress.file_pipeline import compress_file

    return {"bytes": compress_file(source, target, CompressionSettings.parse(settings)).bytes[1]}


def score(lora: str, pictures: int, floor: bool = False) -> dict[str, Any]:
    """What each picture shows, and how far all of them are from held-out pictures of the concept.

    The same prompts from the same noise each time. The probe in assets/tiny-sd reads them.

    Returns:
        concept, caption (shape, colour and background): 1 or 0 for each picture. distance: kernel distance of the probe's features;
        fd: their Fréchet distance. With `floor`, floor_distance and floor_fd: by how much both differ for pictures of the same LoRA
        from other noise.
    """
    import torch

    torch.set_num_threads(1)
    import demo
    import numpy as np
    from evaluate_tiny_sd import CONCEPT

    from lora_compress.evaluation.frechet import frechet_distance
    from lora_compress.evaluation.kernels import kernel_distance
    from lora_compress.evaluation.probe import HEADS, load_probe
    from lora_compress.evaluation.shapes import caption, render, sample_drawing

    generator = np.random.default_rng([7, 1])
    drawings = [sample_drawing(generator, **CONCEPT) for _ in range(pictures)]
    prompts = [caption(drawing, generator, complete=True) for drawing in drawings]
    probe = load_probe(demo.TINY_SD)
    drawn = demo.draw(prompts, probe, Path(lora)).pictures
    read = probe.classify(drawn)
    right = {
        head: read[head] == torch.tensor([HEADS[head].index(getattr(drawing, head)) for drawing in drawings])
        for head in ("shape", "colour", "background", "texture")
    }
    concept, words = right["shape"] & right["texture"], right["shape"] & right["colour"] & right["background"]
    held_out = [render(sample_drawing(generator, **CONCEPT)) for _ in range(_HELD_OUT)]
    with torch.no_grad():
        real = probe.features(torch.from_numpy(np.stack(held_out)).permute(0, 3, 1, 2).float() / 255)
        found = probe.features(drawn)
        other = probe.features(demo.draw(prompts, probe, Path(lora), seed=_OTHER_NOISE).pictures) if floor else None
    said: dict[str, Any] = {"concept": concept.int().tolist(), "caption": words.int().tolist()}
    said |= {"distance": kernel_distance(found, real), "fd": frechet_distance(found, real)}
    if other is not None:
        said["floor_distance"] = abs(kernel_distance(other, real) - said["distance"])
        said["floor_fd"] = abs(frechet_distance(other, real) - said["fd"])
    return said


def share(scored: Mapping[str, Any], what: str) -> float:
    """Of pictures that show it."""
    return sum(scored[what]) / len(scored[what])
