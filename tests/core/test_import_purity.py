"""The core stands alone: importing it brings in no trainer, no host and no model library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOSTS = {"diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "library", "networks", "tensorboard", "torchvision"}


def test_importing_the_core_imports_no_host() -> None:
    script = "import json, sys, lora_compress; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert "lora_compress" in loaded
    assert not loaded & HOSTS
