"""Loading an SDXL LoRA of rank 32: packed against float16 kohya: python benchmarks/load.py

Bytes of the file, seconds from the file to float16 factors of every module in memory and to an adapter in the layers of a full-size
SDXL pipeline, on the CPU, and the largest anonymous memory of the process that makes the factors. The float16 file is read with
safetensors and put into the pipeline by load_lora_weights of diffusers, packed ones by both our load_lora. Warm: the file is in the
system's cache. Cold: it has been dropped from there, and the disk is held to 200 MB/s by a control group, which takes Linux and
root; elsewhere the file is read that slowly before it is opened. Needs 4 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from lora_files import write_lora  # noqa: E402
from measure import Goal, answer, fresh, goal_table  # noqa: E402
from safetensors import safe_open  # noqa: E402

from lora_compress import CompressionSettings, compress_file, load_lora  # noqa: E402

RATE = 200e6  # bytes a second of the storage
BLOCK = 1 << 20
CODECS: dict[str, dict[str, Any]] = {
    "int3": {"bits": 3},
    "int4": {"bits": 4},
    "entropy": {"bits": 3, "strategy": "entropy"},
}
COLUMNS = {  # cold, applied
    "warm": (False, False),
    "cold": (True, False),
    "applied, warm": (False, True),
    "applied, cold": (True, True),
}
_GROUPS = Path("/sys/fs/cgroup")


def throttled(path: Path, rate: float | None) -> int:
    """Read a file, no faster than `rate` bytes a second; returns its bytes."""
    begun, done = time.perf_counter(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            done += len(block)
            if rate:
                time.sleep(max(0.0, begun + done / rate - time.perf_counter()))
    return done


@contextmanager
def slow_disk(folder: Path, rate: float) -> Iterator[Path | None]:
    """A control group whose processes read the disk of `folder` at `rate`: the file to write a process's number to.

    None where there can be none: not Linux, not root, another kind of disk.
    """
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}" if hasattr(os, "major") else ""
    disk = Path(f"/sys/dev/block/{number}")
    if (disk / "partition").exists():
        number = (disk.resolve().parent / "dev").read_text(encoding="ascii").strip()
    group = (_GROUPS / "blkio" if (_GROUPS / "blkio").is_dir() else _GROUPS) / f"lora_compress_{os.getpid()}"
    limits = {"blkio.throttle.read_bps_device": f"{number} {rate:.0f}", "io.max": f"{number} rbps={rate:.0f}"}
    try:
        group.mkdir()
        limit = next(name for name in limits if (group / name).exists())
        (group / limit).write_text(limits[limit], encoding="ascii")
    except (OSError, StopIteration):
        yield None
        return
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()  # its processes have ended


def drop(path: Path) -> None:
    """Take a file out of the system's cache."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(path: str, group: str | None, rate: float | None, threads: int, applied: bool) -> dict[str, Any]:
    """From the file to factors, or to an adapter: seconds and modules; in the control group, or after a slow reading."""
    torch.set_num_threads(threads)
    task = to_adapter(path) if applied else to_factors(path)
    if group:  # from here on, so that nothing else is read that slowly
        drop(Path(path))
        Path(group).write_text(str(os.getpid()), encoding="ascii")
    begun = time.perf_counter()
    if rate and not group:
        throttled(Path(path), rate)
    modules = task()
    return {"seconds": time.perf_counter() - begun, "modules": modules}


def to_factors(path: str) -> Callable[[], int]:
    """Reads every module's factors in float16 and counts the modules."""

    def plain() -> int:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return sum(key.endswith(".alpha") for key in found)

    return plain if Path(path).stem == "plain" else lambda: len(load_lora(path, torch.float16).updates)


def to_adapter(path: str) -> Callable[[], int]:
    """Puts the file into a pipeline and counts the layers that have got it."""
    from library.compress_torchvision import declare_missing_operators

    declare_missing_operators()
    import peft  # noqa: F401  now, not while time is taken

    from lora_compress.diffusers import load_lora as apply

    pipe = pipeline()

    def run() -> int:
        if Path(path).stem == "plain":
            pipe.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name)
        else:
            apply(pipe, path)
        models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
        return sum(hasattr(layer, "lora_A") for model in models for layer in model.modules())

    return run


def pipeline() -> Any:
    """SDXL in float16 with weights that nobody has set, and a VAE in name alone."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    narrow = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    wide = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        models = {"unet": unet, "text_encoder": CLIPTextModel(narrow), "text_encoder_2": CLIPTextModelWithProjection(wide)}
    models = {name: model.half().to_empty(device="cpu") for name, model in models.items()}
    others = {"vae": AutoencoderKL(), "scheduler": EulerDiscreteScheduler(), "tokenizer": None, "tokenizer_2": None}
    return StableDiffusionXLPipeline(**models, **others)


def lines(folder: Path, model: str, rank: int, repeats: int, codecs: list[str], threads: int) -> tuple[list[dict[str, Any]], bool]:
    """A line for the float16 file and for each codec, the best of `repeats` runs in turn; and whether the disk was slowed."""
    plain = folder / "plain.safetensors"
    write_lora(plain, model, rank)
    files = {"fp16 kohya": plain}
    for codec in codecs:
        files[codec] = folder / f"{codec}.safetensors"
        compress_file(plain, files[codec], CompressionSettings.parse(CODECS[codec]))
    found: dict[str, dict[str, Any]] = {
        name: {"name": name, "peak": 0, "bytes": path.stat().st_size} | {column: [] for column in COLUMNS}
        for name, path in files.items()
    }
    with slow_disk(folder, RATE) as group:
        for _ in range(repeats):
            for name, path in files.items():
                for column, (cold, applied) in COLUMNS.items():
                    throttled(path, None)
                    slow = {"group": group, "rate": RATE} if cold else {"group": None, "rate": None}
                    run = fresh(Path(__file__), "load", path=path, threads=threads, applied=applied, **slow)
                    found[name][column].append(run.said["seconds"])
                    if not applied:
                        found[name]["peak"] = max(found[name]["peak"], run.peak)
    return [{**line, **{column: min(line[column]) for column in COLUMNS}} for line in found.values()], group is not None


def goals(found: list[dict[str, Any]]) -> list[Goal]:
    """Bytes and cold time of the packed files, as parts of those of the plain one."""
    plain, *packed = found
    return [
        goal
        for line in packed
        for goal in (
            Goal(f"{line['name']}: bytes read / those of fp16", 0.25, line["bytes"] / plain["bytes"]),
            Goal(f"{line['name']}: cold time / that of fp16", 1.0, line["cold"] / plain["cold"]),
            Goal(f"{line['name']}: cold time until applied / that of fp16", 1.0, line["applied, cold"] / plain["applied, cold"]),
        )
    ]


def main() -> None:
    """Measure and print."""
    if answer({"load": load}, sys.argv[1:]):
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, slowed = lines(Path(folder), "sdxl", args.rank, args.repeats, args.codecs, args.threads)
    how = "from a disk of" if slowed else "after reading the file at"
    print(f"SDXL, rank {args.rank}, {args.threads} threads, best of {args.repeats}; cold: {how} {RATE / 1e6:.0f} MB/s\n")
    print(f"| file | bytes read | {' | '.join(COLUMNS)} | anonymous memory |\n|{'---|' * (3 + len(COLUMNS))}")
    for line in found:
        seconds = (f"{line[column]:.2f} s" for column in COLUMNS)
        print(f"| {line['name']} | {line['bytes'] / 1e6:.1f} MB | {' | '.join(seconds)} | {line['peak'] / 1e6:.0f} MB |")
    print("\n" + goal_table(goals(found)))


if __name__ == "__main__":
    main()
