"""Where the decompositions run on another device, files come out as on the CPU; no tensors of two devices meet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.utils.backend_registration
from core.fresh_process import worker


def test_files_are_those_of_the_cpu(tmp_path: Path) -> None:
    """No GPU is needed: the second device only claims to be one. What a real one rounds differently is not seen here."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no device written in Python: torch 2.10 or newer")
    told = json.loads(worker("core.second_device", str(tmp_path)))
    assert len(told) > 12
    for way, (cpu, second, operations) in told.items():
        assert operations > 100, way
        assert second[1:] == pytest.approx(cpu[1:], rel=2e-3), way
        assert second[0] == cpu[0] or way in ("entropy", "progressive"), way  # there a step's last bit may turn a rounding
