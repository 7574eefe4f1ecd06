"""Two real processes: the same masks, scales and weights on both, and what one process makes of the doubled batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
STEPS = 16
PRUNING = {"iterative_pruning": True, "rank_ratio": 0.5, "min_rank": 1, "max_iterations": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "pruning and int4": {**PRUNING, "qat": True, "bits": 4, "group_size": 16, "importance": "sensitivity"},
    "activations": {**PRUNING, "importance": "activation"},
}


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(command: list[str], folder: Path, settings: dict[str, Any]) -> None:
    worker = str(Path(__file__).with_name("parallel_worker.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    told = [str(folder), json.dumps(settings), str(STEPS)]
    done = subprocess.run([*command, worker, *told], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def agree(folder: Path) -> None:
    """What two ranks and one process have come to."""
    first, second, alone = (torch.load(folder / f"{kind}.pt") for kind in ("2-0", "2-1", "1-0"))
    for part in ("weights", "state"):
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])
    assert torch.equal(first["state"]["kept"], alone["state"]["kept"])
    assert not first["state"]["kept"].all()
    for key, matrix in alone["dense"].items():
        assert matrix.norm() > 0
        assert (first["dense"][key] - matrix).norm() < 1e-4 * matrix.norm()


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_agree_and_are_one_process_with_the_doubled_batch(name: str, tmp_path: Path) -> None:
    run(TORCHRUN, tmp_path, SETTINGS[name])
    run([sys.executable], tmp_path, SETTINGS[name])
    agree(tmp_path)
