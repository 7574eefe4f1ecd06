"""`train_network_ext.py --host diffusers` on tiny-sd, where sd-scripts is not to be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.compress_torchvision import declare_missing_operators
from lora_compress import load_lora
from lora_compress.evaluation.shapes import write_dataset

declare_missing_operators()
pytest.importorskip("peft")

from lora_compress.diffusers import training  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TINY_SD = ROOT / "assets" / "tiny-sd"


def _config(folder: Path) -> dict[str, object]:
    return {
        "model": {"pretrained_model_name_or_path": str(TINY_SD)},
        "dataset": {"train_data_dir": str(folder / "data"), "resolution": "64,64", "output_dir": str(folder)},
        "training": {"max_train_steps": 6, "train_batch_size": 2, "network_dim": 4, "unet_lr": 1e-3, "text_encoder_lr": 1e-3},
    }


def test_packed_file_holds_the_operands_of_the_last_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "data", count=4, repeats=1)
    expected = {}

    class Watched(training.TrainingSession):
        def close(self) -> None:
            for name, pair in self.pairs.items():
                down, up = (self.effective_weight(name, side).detach().flatten(1).double() for side in (0, 1))
                expected[name] = pair.scale * up @ down
            super().close()

    monkeypatch.setattr(training, "TrainingSession", Watched)
    qat = {"bits": 4, "qat": True, "qat_start": 0.3, "save_format": "packed"}
    pruning = {"iterative_pruning": True, "rank_ratio": 0.5}
    path = training.train({**_config(tmp_path), "pruning": pruning, "quantization": qat})
    updates = load_lora(path).updates
    assert set(updates) <= set(expected)
    assert any(delta.abs().max() > 0 for delta in expected.values())
    for name, delta in expected.items():
        if name not in updates:
            assert not delta.any()
            continue
        update = updates[name]
        saved = update.alpha / update.rank * update.up_matrix.double() @ update.down_matrix.double()
        assert (saved - delta).norm() <= 1e-12 * delta.norm()


def test_command_needs_no_sd_scripts_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", count=4, repeats=1)
    config = tmp_path / "config.toml"
    config.write_text('network_dim = 2\nresolution = "64,64"\nmax_train_steps = 1\nclip_skip = 2\nfoo = 1\n', encoding="utf-8")
    options = {"pretrained_model_name_or_path": TINY_SD, "train_data_dir": tmp_path / "data", "output_dir": tmp_path}
    command = [sys.executable, "train_network_ext.py", "--host", "diffusers", f"--config_file={config}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"SD_SCRIPTS_DIR": str(tmp_path / "nowhere")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("leaves out: clip_skip, foo") == 1
    assert load_lora(tmp_path / "last.safetensors").updates


def test_wrong_input_is_one_error(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with pytest.raises(training.LoraCompressError, match="no pictures in folders"):
        training.train(config)
    inner = write_dataset(tmp_path / "data", count=1, repeats=1)
    next(inner.glob("*.txt")).unlink()
    with pytest.raises(training.LoraCompressError, match="has no caption"):
        training.train(config)
    with pytest.raises(training.LoraCompressError, match=r"has no model_index\.json"):
        training.train({**config, "model": {"pretrained_model_name_or_path": str(tmp_path)}})
