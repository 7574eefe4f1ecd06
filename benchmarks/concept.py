"""What the benchmarks of trainings share: tiny-sd learns the striped star as a user trains, and files are scored by pictures."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).resolve()
_ROOT = _SCRIPT.parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks"), str(_ROOT / "tools")]

from measure import answer, fresh  # noqa: E402

__all__ = ["arguments", "compressed", "held_out_features", "scored", "share", "train"]

_HELD_OUT = 512  # pictures of the concept that nobody trained on
_OTHER_NOISE = 1000  # added to the seed of pictures
_PATIENCE = 0.5  # seconds between two looks at a process: its memory is not of interest


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark of trainings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="for data set and files; default a temporary one, removed at the end")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


def train(folder: Path, name: str, seed: int, steps: int, flags: Sequence[str]) -> Path:
    """Train with config/demo.toml through train_network_ext.py, on one thread, unless the file is there already.

    The data set is in `folder`/data; see `lora_compress.evaluation.shapes.write_dataset`.
    """
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


def compressed(source: Path, target: Path, settings: Mapping[str, Any]) -> Path:
    """A finished file, compressed in a process of its own, unless that is there already."""
    if not target.exists():
        fresh(_SCRIPT, "compress", _PATIENCE, source=source, target=target, settings=settings)
    return target


def scored(lora: Path, pictures: int, floor: bool = False) -> dict[str, Any]:
    """Bytes and `_score` of a file; kept beside it, and told again from there as long as the file is the same."""
    kept = lora.with_name(f"{lora.stem}.{pictures}{'.floor' if floor else ''}.json")
    if not kept.exists() or kept.stat().st_mtime < lora.stat().st_mtime:
        said = fresh(_SCRIPT, "score", _PATIENCE, lora=lora, pictures=pictures, floor=floor).said
        kept.write_text(json.dumps({"bytes": lora.stat().st_size, **said}), encoding="utf-8")
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def share(found: Mapping[str, Any], what: str) -> float:
    """Of pictures that show it."""
    return sum(found[what]) / len(found[what])


def held_out_features(pictures: int) -> Any:
    """(512, d), what the probe sees in pictures of the concept that nobody trained on, beside `pictures` that are drawn."""
    import demo
    import torch

    from lora_compress.evaluation.probe import load_probe

    with torch.no_grad():
        return load_probe(demo.TINY_SD).features(_asked_for(pictures)[2])


def _asked_for(pictures: int) -> tuple[list[Any], list[str], Any]:
    """What is to be drawn, its prompts, and pictures of the concept (512, 3, 64, 64) in [0, 1]."""
    import numpy as np
    import torch
    from evaluate_tiny_sd import CONCEPT

    from lora_compress.evaluation.shapes import caption, render, sample_drawing

    generator = np.random.default_rng([7, 1])
    drawings = [sample_drawing(generator, **CONCEPT) for _ in range(pictures)]
    prompts = [caption(drawing, generator, complete=True) for drawing in drawings]
    held_out = np.stack([render(sample_drawing(generator, **CONCEPT)) for _ in range(_HELD_OUT)])
    return drawings, prompts, torch.from_numpy(held_out).permute(0, 3, 1, 2).float() / 255


def _compress(source: str, target: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    from lora_compress import CompressionSettings
    from lora_compress.engine.to_file import compress_file

    return {"bytes": compress_file(source, target, CompressionSettings.parse(settings)).bytes[1]}


def _score(lora: str, pictures: int, floor: bool) -> dict[str, Any]:
    """What each picture shows, and how far all of them are from held-out pictures of the concept.

    The same prompts from the same noise each time. The probe in assets/tiny-sd reads them.

    Returns:
        concept, caption (shape, colour and background): 1 or 0 for each picture. distance: kernel distance of the probe's features;
        fd: their Fréchet distance; features: these features, a row for each picture. With `floor`, floor_distance and floor_fd: by
        how much both differ for pictures of the same LoRA from other noise.
    """
    import torch

    torch.set_num_threads(1)
    import demo

    from lora_compress.evaluation.frechet import frechet_distance
    from lora_compress.evaluation.kernels import kernel_distance
    from lora_compress.evaluation.probe import HEADS, load_probe

    drawings, prompts, held_out = _asked_for(pictures)
    probe = load_probe(demo.TINY_SD)
    drawn = demo.draw(prompts, probe, Path(lora)).pictures
    read = probe.classify(drawn)
    right = {
        head: read[head] == torch.tensor([HEADS[head].index(getattr(drawing, head)) for drawing in drawings])
        for head in ("shape", "colour", "background", "texture")
    }
    concept, words = right["shape"] & right["texture"], right["shape"] & right["colour"] & right["background"]
    with torch.no_grad():
        real = probe.features(held_out)
        found = probe.features(drawn)
        other = probe.features(demo.draw(prompts, probe, Path(lora), seed=_OTHER_NOISE).pictures) if floor else None
    said: dict[str, Any] = {"concept": concept.int().tolist(), "caption": words.int().tolist()}
    said |= {"distance": kernel_distance(found, real), "fd": frechet_distance(found, real), "features": found.tolist()}
    if other is not None:
        said["floor_distance"] = abs(kernel_distance(other, real) - said["distance"])
        said["floor_fd"] = abs(frechet_distance(other, real) - said["fd"])
    return said


if __name__ == "__main__":
    answer({"compress": _compress, "score": _score}, sys.argv[1:])
