"""A batch on Ray, where it is installed: one machine is a cluster too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from core.compressors import lora_file, to_half
from safetensors.torch import load_file

from lora_compress import CompressionSettings, LoraCompressError
from lora_compress.batch import CompressOptions, plan_jobs, run_on_ray

_OPTIONS = CompressOptions(CompressionSettings.parse({"rank_ratio": 0.5}))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install ray")
def test_a_batch_spreads_over_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    monkeypatch.chdir(tmp_path)  # paths are relative to where the command runs, not to where the tasks do
    for index, marker in enumerate((None, "bad", None, "deadly")):
        lora_file(tmp_path / "in" / f"{index}.safetensors", index, marker=marker)
    jobs = plan_jobs("in", "out")
    outcomes = {Path(outcome["input"]).stem: outcome for outcome in run_on_ray(jobs, _OPTIONS, to_half)}
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "0": "written",
        "1": "failed",
        "2": "written",
        "3": "failed",
    }
    assert "is refused" in outcomes["1"]["error"] and "its task was lost" in outcomes["3"]["error"]
    for name in ("0", "2"):
        made, was = load_file(tmp_path / "out" / f"{name}.safetensors"), load_file(tmp_path / "in" / f"{name}.safetensors")
        assert all(torch.equal(made[key], was[key].half()) for key in was)


def test_ray_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    lora_file(tmp_path / "in" / "a.safetensors")
    with pytest.raises(LoraCompressError, match=r"--executor ray: ray is not installed: pip install ray, or use --executor local"):
        list(run_on_ray(plan_jobs(str(tmp_path / "in"), str(tmp_path / "out")), _OPTIONS, to_half))
