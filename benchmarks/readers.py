"""Reading entropy-coded files with numba's loops and without: python benchmarks/readers.py

What decides whether both readers are kept: a plug-in runs in the Python of its host, which has constriction but usually no numba.
Each line is a fresh process that loads a packed file to float16 factors on two threads: the first time on the clock and in
processor time, loading of the loops counted, and the fastest of the times after it in processor time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from lora_files import write_lora  # noqa: E402
from measure import answer, fresh  # noqa: E402

from lora_compress import CompressionSettings, compress_file, load_lora  # noqa: E402

_FILES = {  # model, rank, settings
    "SD1.5, rank 8": ("sd15", 8, {}),
    "SDXL, rank 32": ("sdxl", 32, {}),
    "SDXL, rank 32, progressive": ("sdxl", 32, {"progressive": True}),
}
_SCRIPT = Path(__file__).resolve()


def load(path: str, numba: bool, times: int) -> dict[str, Any]:
    """Load a packed file some times; without numba as where it is not installed."""
    if not numba:
        sys.modules["numba"] = None  # type: ignore[assignment]
    torch.set_num_threads(2)
    clock, used, weights = [], [], 0
    for _ in range(times):
        started, before = time.monotonic(), time.process_time()
        updates = load_lora(path, dtype=torch.float16).updates
        clock.append(time.monotonic() - started)
        used.append(time.process_time() - before)
        weights = sum(update.down.numel() + update.up.numel() for update in updates.values())
    return {"seconds": clock[0], "cpu": used[0], "later_cpu": min(used[1:]), "weights": weights}


def lines_of(folder: Path, every: int, times: int) -> Iterator[dict[str, Any]]:
    """A line for each file and reader."""
    for name, (model, rank, more) in _FILES.items():
        source, packed = folder / "plain.safetensors", folder / "packed.safetensors"
        write_lora(source, model, rank, every)
        compress_file(source, packed, CompressionSettings.parse({"strategy": "entropy", "bits": 3, **more}))
        for numba in (True, False):
            fresh(_SCRIPT, "load", path=packed, numba=numba, times=2)  # compiles, and fills the cache of the system
            found = fresh(_SCRIPT, "load", path=packed, numba=numba, times=times).said
            yield {"file": name, "megabytes": packed.stat().st_size / 1e6, "numba": numba, **found}


def main() -> None:
    """Print the lines as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every n-th module of the models")
    parser.add_argument("--times", type=int, default=4, help="times that a process loads the file, 2 or more")
    args = parser.parse_args()
    print("| file | packed | weights | reader | first time, clock | first time, processor | later, processor |\n|" + "---|" * 7)
    with tempfile.TemporaryDirectory() as folder:
        for line in lines_of(Path(folder), args.every, args.times):
            reader = "numba" if line["numba"] else "constriction and numpy"
            seconds = " | ".join(f"{line[key]:.2f} s" for key in ("seconds", "cpu", "later_cpu"))
            print(
                f"| {line['file']} | {line['megabytes']:.1f} MB | {line['weights'] / 1e6:.1f} M | {reader} | {seconds} |",
                flush=True,
            )


if __name__ == "__main__" and not answer({"load": load}, sys.argv[1:]):
    main()
