"""Shared by the tests of tiny-sd: its folder, its pipeline, and the tools' import path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from library.compress_torchvision import declare_missing_operators  # noqa: E402

declare_missing_operators()


@pytest.fixture(scope="session")
def tiny_sd() -> Path:
    """The model folder that is part of the project."""
    return ROOT / "assets" / "tiny-sd"


@pytest.fixture(scope="session")
def pipeline(tiny_sd: Path):
    """tiny-sd, loaded with no network to reach."""
    from evaluate_tiny_sd import load_pipeline

    return load_pipeline(tiny_sd)
