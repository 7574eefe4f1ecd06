"""Reads wrong files one after the other, each within a limit of time and of address space, and tells what became of them.

    python -m core.fuzz_worker FOLDER COUNT SEED

A process of its own, because its limits are those of the process. Prints the counts, or the first defect, and exits with 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from core.mutations import mutate
from core.samples import CODECS, LAYOUTS, kohya_file, packed_file, sample_file

from lora_compress import CompressionSettings, LoraCompressError, open_lora
from lora_compress.engine.to_file import compress_file
from lora_compress.engine.unpack import expand_file, truncate_file
from lora_compress.packed.file import PackedFile

SECONDS = 10.0  # of processor time a file
MEMORY = 200_000_000  # bytes of address space beyond what a file was found to declare
SETTINGS = [{"bits": 4}, {"bits": 3, "strategy": "entropy"}, {"new_rank": 2}, {"save_format": "fp8"}, {"target_error": 0.3}]


@contextlib.contextmanager
def within(extra: int) -> Iterator[None]:
    """Address space for this much more than now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def read(path: Path, repair: bool) -> str:
    """Every reader of a file, a module at a time."""
    told = "read"
    with within(MEMORY):
        source = open_lora(path, repair)
    try:
        for name in source:
            shape = source.shapes[name]
            weights = shape.rank * (shape.outputs + shape.inputs * torch.Size(shape.kernel).numel())
            assert weights <= 2**28 + 2**10 * path.stat().st_size, "declares far more than it can hold"
            with within(MEMORY + 4 * weights):
                try:
                    update = source[name]
                    assert tuple(update.down.shape[1:]) == (shape.inputs, *shape.kernel)
                    assert update.up.shape[0] == shape.outputs
                    assert not isinstance(source, PackedFile) or bool(
                        torch.isfinite(update.down).all() & torch.isfinite(update.up).all()
                    )
                    del update
                except LoraCompressError:
                    told = "read in part"
        with within(MEMORY):
            for name in source:
                source.extras(name)
                assert source.factor_bytes(name) <= path.stat().st_size
            dict(source.others)
            source.plain_metadata(dict.fromkeys(source, 1))
            source.part(next(iter(source), ""))
            assert isinstance(source.notes, list) and isinstance(source.family, str)
    finally:
        source.close()
    return told


def write(path: Path, target: Path, roll: random.Random) -> str:
    """Every program that makes a file of a file."""
    declared = 0
    source = open_lora(path)
    kind = roll.choice(["compress", "expand", "truncate", "truncate"] if isinstance(source, PackedFile) else ["compress"])
    for shape in source.shapes.values():
        declared += shape.rank * (shape.outputs + shape.inputs * torch.Size(shape.kernel).numel())
    source.close()
    if declared > 2**24:
        return "too large to write"
    with within(2 * MEMORY + 40 * declared):
        if kind == "compress":
            compress_file(path, target, CompressionSettings.parse(roll.choice(SETTINGS)), repair=roll.random() < 0.5)
        elif kind == "expand":
            expand_file(path, target, save_dtype=torch.float32)
        else:
            truncate_file(path, target, roll.randrange(path.stat().st_size // 2, path.stat().st_size + 200))
    return kind


def attempt(path: Path, target: Path, roll: random.Random) -> str:
    """What became of one file."""
    try:
        told = read(path, repair=roll.random() < 0.5)
        if roll.random() < 0.5:
            told = write(path, target, roll)
        return told
    except LoraCompressError:
        return "refused"


def good_files(folder: Path) -> list[bytes]:
    """One of each layout and of each codec."""
    files = [sample_file(layout, folder, name=f"{layout}.safetensors") for layout in LAYOUTS]
    source = kohya_file(folder / "source.safetensors", count=3, width=24, rank=6)
    packed = [packed_file(codec, source, folder / f"{codec}.safetensors") for codec in CODECS]
    packed += [
        packed_file(codec, files[0], folder / f"carried {codec}.safetensors") for codec in ("int4", "progressive", "progressive")
    ]
    assert all(isinstance(open_lora(path), PackedFile) for path in packed)
    return [path.read_bytes() for path in files + packed]


def main(folder: Path, count: int, seed: int) -> int:
    """Reads `count` files; 1 if there was a defect."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", RuntimeWarning)  # numbers that overflow unseen
    good = good_files(folder)
    path, target = folder / "wrong.safetensors", folder / "written.safetensors"
    for data in good:  # what is loaded late and kept for long is there before anything is measured
        path.write_bytes(data)
        assert read(path, False) == "read"
    counts: Counter[str] = Counter()
    longest = 0.0
    for number in range(count):
        roll = random.Random(f"{seed} {number}")
        path.write_bytes(mutate(good[number % len(good)], roll))
        faulthandler.dump_traceback_later(20 * SECONDS, exit=True)
        begun = time.process_time()
        try:
            counts[attempt(path, target, roll)] += 1
            seconds = time.process_time() - begun
            assert seconds < SECONDS, f"took {seconds:.1f} s"
        except Exception:
            traceback.print_exc()
            kept = folder / f"defect-{seed}-{number}.safetensors"
            path.rename(kept)
            print(f"file {number} of seed {seed}, in {kept}")
            return 1
        longest = max(longest, seconds)
        faulthandler.cancel_dump_traceback_later()
        target.unlink(missing_ok=True)
    print(f"{count} files, the longest {longest:.2f} s: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
