"""Plain files and load_lora on further releases of diffusers, which `python bootstrap.py test` puts beside the pinned one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from consumers.conftest import absent

ROOT = Path(__file__).resolve().parents[2]
RELEASES = {"0.35.2": ".diffusers-0.35", "0.38.0": ".diffusers-0.38", "0.42.1": ".diffusers-0.42"}
LOADERS = ("tests/consumers/test_diffusers.py", "tests/consumers/test_matrix.py", "tests/consumers/test_diffusers_families.py")
CHOSEN = {"0.42.1": (LOADERS, "layer or swapped or weighed or flux or naive")}  # the newest one with newer transformers and PEFT
OTHERS = (LOADERS[1:], "get_to_every_layer or naive or (kohya and sd)")  # only what depends on diffusers' own converters


@pytest.mark.parametrize("release", RELEASES)
def test_the_tests_of_loaders_pass_on_other_releases(release: str) -> None:
    overlay = Path(os.environ.get("DIFFUSERS_OVERLAYS") or ROOT) / RELEASES[release]
    if not (overlay / "diffusers").is_dir():
        absent(f"pip install --no-deps --target {overlay} -r requirements/{RELEASES[release][1:]}.txt has not been run")
    environment = os.environ | {"PYTHONPATH": str(overlay), "HF_HUB_OFFLINE": "1"}
    told = f"import diffusers; assert diffusers.__version__ == {release!r}, diffusers.__version__"
    subprocess.run([sys.executable, "-c", told], env=environment, check=True, timeout=120)
    files, chosen = CHOSEN.get(release, OTHERS)
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
