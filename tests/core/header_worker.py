"""Opens files, each in a process of its own, and tells what became of each and how far memory rose for it.

    python -m core.header_worker FILE...

Prints a list of [megabytes, message] as JSON. Address space is limited too, as for every fuzzed file.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from pathlib import Path

import torch
from core.fuzz_worker import within

from lora_compress import LoraCompressError, open_lora

_SECONDS = 400
_ROOM = 1_500_000_000  # bytes of address space beyond what is there: what is opened must do with less


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def opened(path: str) -> tuple[float, str]:
    """Megabytes that opening took at most beyond what was there before, and the error, if any."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark is now what is there
    before = memory("VmRSS")
    with within(_ROOM):
        try:
            open_lora(path).close()
            told = "opened"
        except LoraCompressError as error:
            told = str(error)
    return (memory("VmHWM") - before) / 1e6, told


if __name__ == "__main__":
    torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = pool.map_async(opened, sys.argv[1:], chunksize=1)
        print(json.dumps(found.get(timeout=_SECONDS)))  # a pool waits for ever for a process that died
