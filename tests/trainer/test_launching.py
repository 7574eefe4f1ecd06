"""The shell scripts of docs/launching.md, run as they stand there with their variables set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_compress import load_lora
from lora_compress.evaluation.shapes import write_dataset

ROOT = Path(__file__).resolve().parents[2]
SHELL = shutil.which("sh")


def script(name: str) -> str:
    text = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(name)}:\n\n```sh\n(.*?)```", text, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.skipif(SHELL is None, reason="there is no sh")
def test_train_then_resize(sd_scripts: Path, torchvision_repair: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", count=2, repeats=1)
    lora, small = tmp_path / "out" / "mine.kohya.safetensors", tmp_path / "small.safetensors"
    train = {"model": "assets/tiny-sd", "data": tmp_path / "data", "output": tmp_path / "out", "name": "mine"}
    train |= {"resolution": "64,64", "steps": 4, "precision": "no", "dim": 4, "alpha": 4, "unet_lr": 1e-3}
    train |= {"more": "--tokenizer_cache_dir assets/tiny-sd/tokenizer_cache"}
    resize = {"model": lora, "save_to": small, "size": "90kB", "consumer": "a1111"}
    environment = os.environ | {"SD_SCRIPTS_DIR": str(sd_scripts), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment["PYTHONPATH"] = str(torchvision_repair)
    for name, values in (("train.sh", train), ("resize.sh", resize)):
        own = environment | {key: str(value) for key, value in values.items()}
        done = subprocess.run(["sh", "-euc", script(name)], cwd=ROOT, env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    packed = load_lora(tmp_path / "out" / "mine.safetensors")
    assert packed.metadata["ss_compress_bits"] == "4" and packed.updates.keys() == load_lora(lora).updates.keys()
    assert small.stat().st_size <= 90_000 and load_lora(small).updates
    assert "<svg" in (tmp_path / "small.safetensors.html").read_text(encoding="utf-8")
