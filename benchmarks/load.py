"""Loading an SDXL LoRA of rank 32: packed against float16 kohya: python benchmarks/load.py

Bytes read, seconds from the file to float16 factors of every module in memory, on the CPU, and the largest anonymous memory of the
process. What follows, the adapter in the model, is the same for both. A cold cache is a reader held to 200 MB/s before that work,
from a file that is in memory: what storage of that speed takes, on any machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from lora_files import write_lora  # noqa: E402
from measure import Goal, answer, fresh, goal_table  # noqa: E402

from lora_compress import CompressionSettings, LowRankUpdate, compress_file, open_lora  # noqa: E402
from lora_compress.parallel import each_module  # noqa: E402

RATE = 200e6  # bytes a second of the storage that is stood in for
BLOCK = 1 << 20
CODECS: dict[str, dict[str, Any]] = {
    "int3": {"bits": 3},
    "int4": {"bits": 4},
    "entropy": {"bits": 3, "strategy": "entropy"},
}


def throttled(path: Path, rate: float | None) -> int:
    """Read a file, no faster than `rate` bytes a second; returns its bytes."""
    begun, done = time.perf_counter(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            done += len(block)
            if rate:
                time.sleep(max(0.0, begun + done / rate - time.perf_counter()))
    return done


def _factors(_: str, update: LowRankUpdate) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Its own, for those of a plain file are the file's."""
    return update.down.to(torch.float16, copy=True), update.up.to(torch.float16, copy=True), update.alpha


def load(path: str, rate: float | None, threads: int) -> dict[str, Any]:
    """From the file to every module's factors in float16: bytes read and seconds."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    read = throttled(Path(path), rate)
    source = open_lora(path)
    attached = each_module(_factors, source)
    seconds = time.perf_counter() - begun
    return {"bytes": read, "seconds": seconds, "modules": len(attached)}


def lines(folder: Path, model: str, rank: int, repeats: int, codecs: list[str], threads: int) -> list[dict[str, Any]]:
    """A line for the float16 file and for each codec: the best of `repeats` runs, taken in turn."""
    plain = folder / "plain.safetensors"
    write_lora(plain, model, rank)
    files = {"fp16 kohya": plain}
    for codec in codecs:
        files[codec] = folder / f"{codec}.safetensors"
        compress_file(plain, files[codec], CompressionSettings.parse(CODECS[codec]))
    found: dict[str, dict[str, Any]] = {name: {"name": name, "warm": [], "cold": [], "peak": 0} for name in files}
    for _ in range(repeats):
        for name, path in files.items():
            for state, rate in (("warm", None), ("cold", RATE)):
                run = fresh(Path(__file__), "load", path=path, rate=rate, threads=threads)
                found[name][state].append(run.said["seconds"])
                found[name]["peak"] = max(found[name]["peak"], run.peak)
                found[name]["bytes"] = run.said["bytes"]
    return [{**line, "warm": min(line["warm"]), "cold": min(line["cold"])} for line in found.values()]


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
        found = lines(Path(folder), "sdxl", args.rank, args.repeats, args.codecs, args.threads)
    print(f"SDXL, rank {args.rank}, {args.threads} threads, best of {args.repeats}; cold: read at {RATE / 1e6:.0f} MB/s\n")
    print("| file | bytes read | warm | cold | anonymous memory |\n|---|---|---|---|---|")
    for line in found:
        cells = (f"{line['bytes'] / 1e6:.1f} MB", f"{line['warm']:.2f} s", f"{line['cold']:.2f} s", f"{line['peak'] / 1e6:.0f} MB")
        print(f"| {line['name']} | {' | '.join(cells)} |")
    print("\n" + goal_table(goals(found)))


if __name__ == "__main__":
    main()
