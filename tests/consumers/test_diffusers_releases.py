"""load_lora on the newest diffusers, transformers and PEFT, which `python bootstrap.py test` puts beside the pinned ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from consumers.conftest import absent

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = Path(os.environ.get("DIFFUSERS_OVERLAY") or ROOT / ".diffusers-0.42")


def test_the_tests_of_load_lora_pass_on_the_newest_diffusers() -> None:
    if not (OVERLAY / "diffusers").is_dir():
        absent(f"pip install --no-deps --target {OVERLAY} -r requirements/diffusers-0.42.txt has not been run")
    environment = os.environ | {"PYTHONPATH": str(OVERLAY), "HF_HUB_OFFLINE": "1"}
    told = "import diffusers; assert diffusers.__version__ == '0.42.1', diffusers.__version__"
    subprocess.run([sys.executable, "-c", told], env=environment, check=True, timeout=120)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/consumers/test_diffusers.py",
        "tests/consumers/test_matrix.py",
        "tests/consumers/test_peft_methods.py",
        "-k",
        "layer or swapped or weighed or flux or naive or peft_applies or by_name",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
