"""Loading an SDXL LoRA of rank 32: packed against float16 kohya: python benchmarks/load.py

Bytes of the file, seconds from the file to float16 factors of every module in memory, on the CPU, and the largest anonymous memory
of the process. What follows, the adapter in the model, is the same for both. The float16 file is read with safetensors, packed ones
with load_lora. Warm: the file is in the system's cache. Cold: it has been dropped from there, and the disk is held to 200 MB/s by a
control group, which takes Linux and root; elsewhere the file is read that slowly before it is opened.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
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


def load(path: str, group: str | None, rate: float | None, threads: int) -> dict[str, Any]:
    """From the file to every module's factors in float16: seconds and modules; in the control group, or after a slow reading."""
    torch.set_num_threads(threads)
    if group:
        Path(group).write_text(str(os.getpid()), encoding="ascii")
    begun = time.perf_counter()
    if rate and not group:
        throttled(Path(path), rate)
    if Path(path).stem == "plain":
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        modules = sum(key.endswith(".alpha") for key in found)
    else:
        found = dict(load_lora(path, torch.float16).updates)
        modules = len(found)
    return {"seconds": time.perf_counter() - begun, "modules": modules}


def lines(folder: Path, model: str, rank: int, repeats: int, codecs: list[str], threads: int) -> tuple[list[dict[str, Any]], bool]:
    """A line for the float16 file and for each codec, the best of `repeats` runs in turn; and whether the disk was slowed."""
    plain = folder / "plain.safetensors"
    write_lora(plain, model, rank)
    files = {"fp16 kohya": plain}
    for codec in codecs:
        files[codec] = folder / f"{codec}.safetensors"
        compress_file(plain, files[codec], CompressionSettings.parse(CODECS[codec]))
    found: dict[str, dict[str, Any]] = {
        name: {"name": name, "warm": [], "cold": [], "peak": 0, "bytes": path.stat().st_size} for name, path in files.items()
    }
    with slow_disk(folder, RATE) as group:
        for _ in range(repeats):
            for name, path in files.items():
                for state in ("warm", "cold"):
                    throttled(path, None)
                    if state == "cold" and group:
                        drop(path)
                    slow = {"group": group, "rate": RATE} if state == "cold" else {"group": None, "rate": None}
                    run = fresh(Path(__file__), "load", path=path, threads=threads, **slow)
                    found[name][state].append(run.said["seconds"])
                    found[name]["peak"] = max(found[name]["peak"], run.peak)
    return [{**line, "warm": min(line["warm"]), "cold": min(line["cold"])} for line in found.values()], group is not None


def goals(found: list[dict[str, Any]]) -> list[Goal]:
    """Bytes and cold time of the packed files, as parts of those of the plain one."""
    plain, *packed = found
    return [
        goal
        for line in packed
        for goal in (
            Goal(f"{line['name']}: bytes read / those of fp16", 0.25, line["bytes"] / plain["bytes"]),
            Goal(f"{line['name']}: cold time / that of fp16", 1.0, line["cold"] / plain["cold"]),
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
    print("| file | bytes read | warm | cold | anonymous memory |\n|---|---|---|---|---|")
    for line in found:
        cells = (f"{line['bytes'] / 1e6:.1f} MB", f"{line['warm']:.2f} s", f"{line['cold']:.2f} s", f"{line['peak'] / 1e6:.0f} MB")
        print(f"| {line['name']} | {' | '.join(cells)} |")
    print("\n" + goal_table(goals(found)))


if __name__ == "__main__":
    main()
