"""Wrong files of every layout and codec: one error of ours or a result, in little time and memory.

`LORA_COMPRESS_FUZZ=10000` reads that many; otherwise a share of them is read.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from core.mutations import mutate, pack, unpack
from core.samples import CODECS, kohya_file, packed_file

from lora_compress import open_lora

ROOT = Path(__file__).resolve().parents[2]
COUNT = int(os.environ.get("LORA_COMPRESS_FUZZ", "1000"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc and limits address space")
def test_wrong_files_are_refused_or_read(tmp_path: Path) -> None:
    """Seeds are fixed: what failed once fails again. The worker says which file it was and keeps it."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "core.fuzz_worker", str(tmp_path), str(COUNT), "0"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    print(done.stdout)


def test_mutations_are_what_they_claim(tmp_path: Path) -> None:
    """A packed file taken apart and put together reads the same; nearly every mutation makes another file."""
    source = kohya_file(tmp_path / "source.safetensors", count=3, width=24, rank=6)
    for codec in CODECS:
        good = packed_file(codec, source, tmp_path / "good.safetensors")
        data = good.read_bytes()
        again = tmp_path / "again.safetensors"
        again.write_bytes(pack(*unpack(data)))
        before, after = open_lora(good), open_lora(again)
        assert [*before] == [*after]
        assert all((before[name].down == after[name].down).all() for name in before)
        assert sum(mutate(data, random.Random(seed)) != data for seed in range(60)) > 50
