"""benchmarks/base_memory.py: packs by the trainer's own hook, and its goals know which way is better."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import measure
import pytest
import torch


def test_it_packs_as_the_trainer_does(sd_scripts: Path) -> None:
    from lora_compress.frozen import weight_bytes

    base_memory = importlib.import_module("base_memory")
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Conv2d(64, 64, 3)).half()
    sizes = {"fp16": weight_bytes(model)}
    for name in ("int8", "nf4"):
        model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Conv2d(64, 64, 3)).half()
        base_memory.pack(model, name)
        sizes[name] = weight_bytes(model)
    assert sizes["int8"] == pytest.approx(sizes["fp16"] / 2, rel=0.02)
    assert sizes["nf4"] < 0.4 * sizes["fp16"]
    found = {"SD 1.5": sizes, "FLUX.1": sizes}
    assert [goal.met for goal in base_memory.goals_of(found, {})] == [True, True]
    found = {"SD 1.5": sizes | {"int8": 0.6 * sizes["fp16"]}, "FLUX.1": sizes | {"nf4": 0.5 * sizes["fp16"]}}
    assert [goal.met for goal in base_memory.goals_of(found, {})] == [False, False]


_WATCHED = """
import time, measure, torch
def hold(size):
    data = torch.ones(size)
    time.sleep(0.5)  # long enough to be looked at on a busy machine
    return len(data)
measure.watched(lambda: hold(1))
_, before = measure.watched(lambda: hold(1))
length, peak = measure.watched(lambda: hold(50_000_000))
print(length, peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory_of_a_part_of_a_process_is_seen() -> None:
    """In a process of its own: what other tests let go of would hide what is asked for here."""
    environment = os.environ | {"PYTHONPATH": str(Path(measure.__file__).parent)}
    told = subprocess.run([sys.executable, "-c", _WATCHED], env=environment, capture_output=True, text=True, check=True).stdout
    length, grown = map(int, told.split())
    assert length == 50_000_000 and 150e6 < grown < 300e6
