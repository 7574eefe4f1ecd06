"""Validation pictures in a real training: what is measured, kept and resumed, and that the training does not notice."""

from __future__ import annotations

import argparse
import html
import importlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from lora_compress import EvaluationSettings, SettingsError, load_lora
from lora_compress.evaluation.shapes import write_dataset
from lora_compress.evaluation.validation import Validation, read_history
from lora_compress.training.evaluator import Evaluator
from tests import models
from tests.core.training.test_adapting import Run
from tests.trainer.test_config import parse, write
from tests.trainer.test_train import config

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the trainings are forks of one process")

STILL = {"learning_rate": 1e-30, "max_train_steps": 1, "validation_split": 0.5, "validate_every_n_steps": 1}


@pytest.fixture(scope="module")
def root(sd_scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which some trainings have been, each in a folder of its own."""
    root = tmp_path_factory.mktemp("validation")
    write_dataset(root / "pictures", count=8, repeats=1)
    write_dataset(root / "held", count=6, repeats=1, seed=5)
    held = {"extractor": "probe", "reference": str(root / "held"), "count": 4, "size": 64, "steps": 2}
    split = {"extractor": "probe", "count": 5, "size": 64, "steps": 2}
    longer = {"max_train_steps": 4, "network_dropout": 0.1, "logging_dir": "logs", "validate_every_n_steps": 2}
    saving = {"save_every_n_steps": 2, "save_state": True}
    state = {"resume": str(root / "measured" / "lora-step00000002-state"), "skip_until_initial_step": True}
    adapted = {
        "max_train_steps": 7,
        "validate_every_n_steps": 1,
        "evaluation": {"extractor": "probe", "reference": str(root / "held"), "count": 4, "size": 64, "steps": 1},
        "pruning": {"rank_ratio": 0.8, "min_rank": 0, "pruning_start": 0.0, "pruning_end": 0.15, "max_iterations": 1},
        "quantization": {"bits": 8, "qat_start": 0.15},
        "adaptive": {"max_fid_gap": 1e6, "patience": 1},  # any gap is small enough: it compresses as soon as it may
        "save_every_n_steps": 3,
        "save_state": True,
    }
    middle = {"resume": str(root / "adapted" / "lora-step00000003-state"), "skip_until_initial_step": True}
    trainings: dict[str, dict[str, Any]] = {
        "adapted": adapted,
        "adapted again": adapted | middle,
        "adapted by two": adapted | {"save_state": None, "save_every_n_steps": None},
        "plain": longer | saving,
        "measured": longer | saving | {"evaluation": held},
        "resumed": longer | state | saving | {"evaluation": held},
        "alone": STILL | {"evaluation": split},
        "shared": STILL | {"evaluation": split},
        "epochs": STILL
        | {
            "evaluation": held,
            "max_train_steps": 3,
            "train_batch_size": 4,
            "validation_split": 0.0,
            "validate_every_n_steps": None,
        },
    }
    jobs = []
    for name, values in trainings.items():
        (root / name).mkdir()
        values = {key: value for key, value in values.items() if value is not None}
        if "logging_dir" in values:
            values["logging_dir"] = str(root / name / "logs")
        argv = config(models.TINY_SD, root / "pictures", root / name, **values)
        environment = {"LORA_COMPRESS_CACHE": str(root / "cache"), "ACCELERATE_USE_CPU": "true"}
        ranks: list[dict[str, str]] = [{}]
        if name in ("shared", "adapted by two"):
            common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(2)]
        jobs.append(
            [{"argv": argv, "environment": environment | rank, "log": str(root / f"{name}{i}.log")} for i, rank in enumerate(ranks)]
        )
    worker = Path(__file__).with_name("fork_worker.py")
    done = subprocess.run([sys.executable, str(worker)], input=json.dumps(jobs), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    statuses = dict(zip(trainings, json.loads(done.stdout.splitlines()[-1]), strict=True))
    for name, status in statuses.items():
        assert not any(status), (name, *(log.read_text()[-3000:] for log in root.glob(f"{name}?.log")))
    return root


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def history(root: Path, name: str) -> list[dict[str, Any]]:
    """Without the times."""
    entries = read_history(root / name / "lora.evaluations.jsonl")
    assert all(entry.pop("seconds") >= 0 for entry in entries)
    return entries


def losses(root: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _scalars(root, name, "loss/current")]


def _scalars(root: Path, name: str, tag: str) -> list[Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = next(path.parent for path in (root / name / "logs").rglob("events.out.tfevents.*"))
    return EventAccumulator(str(logs)).Reload().Scalars(tag)


def test_a_training_that_is_measured_is_the_same_to_the_last_bit(root: Path) -> None:
    plain, measured = (load_file(root / name / "lora.safetensors") for name in ("plain", "measured"))
    assert plain.keys() == measured.keys() and all(torch.equal(plain[key], measured[key]) for key in plain)
    assert len(losses(root, "plain")) == 4 and losses(root, "plain") == losses(root, "measured")
    assert not (root / "plain" / "lora.evaluations.jsonl").exists()
    assert {path.name for path in (root / "measured").iterdir()} - {path.name for path in (root / "plain").iterdir()} == {
        "lora.evaluations.jsonl",
        "lora.evaluations.html",
    }  # no picture is left behind


def test_numbers_are_in_the_history_and_with_the_trackers(root: Path) -> None:
    first, second = history(root, "measured")
    assert (first["step"], first["pictures"], first["reference"], second["step"]) == (2, 4, 6, 4)
    assert first["probe_fd"] != second["probe_fd"] and first["probe_fd_floor"] == second["probe_fd_floor"] > 0
    for name in ("probe_fd", "probe_kd", "probe_fd_floor"):
        logged = [(event.step, event.value) for event in _scalars(root, "measured", f"evaluation/{name}")]
        assert logged == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in (first, second)]


def test_a_resumed_training_goes_on_with_its_history(root: Path) -> None:
    saved = read_history(root / "measured" / "lora-step00000002-state" / "compress_evaluations.jsonl")
    assert [entry["step"] for entry in saved] == [2]
    resumed, whole = history(root, "resumed"), history(root, "measured")
    assert resumed[0] == whole[0] and [entry["step"] for entry in resumed] == [2, 4]
    assert resumed[1]["probe_fd_floor"] == whole[1]["probe_fd_floor"]


def test_the_controller_changes_ranks_and_bits_and_says_so(root: Path) -> None:
    entries = history(root, "adapted")
    assert [entry["action"] for entry in entries] == ["keep"] * 2 + ["compress"] * 3 + ["keep"] * 2  # scales freeze at 6
    assert [entry["rank_ratio"] for entry in entries] == [0.8, 0.8, 0.8, 0.75, 0.7, 0.65, 0.65]
    assert [entry["bits"] for entry in entries] == [8, 8, 8, 6, 4, 4, 4]
    assert all("probe_fd_full" in entry and entry["bytes"] > 0 for entry in entries)
    assert entries[-1]["bytes"] < 0.7 * entries[2]["bytes"]
    file = load_lora(root / "adapted" / "lora.safetensors")
    kept, components = map(int, file.metadata["ss_compress_components"].split("/"))
    assert file.metadata["ss_compress_bits"] == "4" and kept == int(0.65 * components)
    assert file.metadata["ss_compress_adaptive"] == "fid_gap"
    changes = file.metadata["ss_compress_adaptive_changes"].split("; step ")
    assert [change.split(":")[0] for change in changes] == ["step 3", "4", "5"]
    page = (root / "adapted" / "lora.evaluations.html").read_text(encoding="utf-8")
    assert all(entry["reason"] in html.unescape(page) for entry in entries)


def test_an_adapted_training_that_is_interrupted_between_decision_and_step_goes_on_with_it(root: Path) -> None:
    """Numbers differ a little, as sd-scripts resumes with other noise; tests/core/training/test_adapting.py has them equal."""
    names = ("step", "optimizer_steps", "rank_ratio", "bits", "strategy", "action", "next")
    runs = [[{name: entry.get(name) for name in names} for entry in history(root, run)] for run in ("adapted", "adapted again")]
    assert runs[0] == runs[1]
    files = [load_lora(root / run / "lora.safetensors").metadata for run in ("adapted", "adapted again")]
    for name in ("components", "bits", "rank_ratio", "trained_steps"):
        assert files[0][f"ss_compress_{name}"] == files[1][f"ss_compress_{name}"]


def test_two_processes_share_the_pictures_and_find_what_one_finds(root: Path) -> None:
    (alone,), (shared,) = history(root, "alone"), history(root, "shared")
    assert (alone["pictures"], alone["reference"]) == (5, 4)  # of the validation split
    for name in ("probe_fd", "probe_kd", "probe_fd_floor", "probe_kd_floor"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-3)


def test_two_processes_follow_one_decision(root: Path) -> None:
    names = ("step", "rank_ratio", "bits", "strategy", "action", "next")
    runs = [[{name: entry.get(name) for name in names} for entry in history(root, run)] for run in ("adapted", "adapted by two")]
    assert runs[0] == runs[1]
    logs = [(root / f"adapted by two{rank}.log").read_text() for rank in range(2)]
    kept = [re.findall(r"step (\d+): (\d+) of\s+(\d+)\s+components", log) for log in logs]
    assert len(kept[0]) > 3 and kept[0] == kept[1]
    files = [load_lora(root / run / "lora.safetensors").metadata for run in ("adapted", "adapted by two")]
    assert files[0]["ss_compress_components"] == files[1]["ss_compress_components"]


def test_every_epoch_is_measured_and_the_last_step(root: Path) -> None:
    assert [(entry["step"], entry["epoch"]) for entry in history(root, "epochs")] == [(2, 1), (3, 2)]


def test_an_evaluation_that_fails_is_an_entry_and_the_training_goes_on(
    sd_scripts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """sd-scripts' sampling is called without a model, and fails; dropout, generators and trackers are as they were."""
    monkeypatch.setenv("LORA_COMPRESS_CACHE", str(tmp_path / "cache"))
    values = {"extractor": "probe", "reference": str(write_dataset(tmp_path / "held", count=4)), "count": 4, "size": 64}
    host = importlib.import_module("train_network").NetworkTrainer
    mixin = importlib.import_module("library.compress_validation").ValidationMixin
    trainer = type("Mixed", (mixin, host), {})()
    trainer._trained, trainer._steps_per_epoch = torch.nn.Dropout(), 3
    evaluator = Evaluator(Validation.prepare(EvaluationSettings.parse(values)), tmp_path / "lora")
    accelerator = Accelerator(cpu=True)
    before = torch.get_rng_state(), accelerator.trackers
    args = argparse.Namespace(output_dir=str(tmp_path), output_name="lora")
    trainer._validate(evaluator, accelerator, args, 4, ())
    (entry,) = read_history(tmp_path / "lora.evaluations.jsonl")
    assert (entry["step"], entry["epoch"]) == (4, 2) and entry["error"].startswith("TypeError") and "probe_fd" not in entry
    assert torch.equal(torch.get_rng_state(), before[0]) and accelerator.trackers is before[1] and trainer._trained.training


def test_the_size_of_a_training_that_diverged_is_left_out() -> None:
    evaluator, run = Evaluator.__new__(Evaluator), Run()
    assert evaluator._size(run.session)["bytes"] > 0
    next(iter(run.session.pairs.values())).weights[0].data[0] = torch.nan
    assert evaluator._size(run.session) == {}


def test_settings_of_the_evaluation_are_the_sections_and_above_them_the_flags(
    sd_scripts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ext = importlib.import_module("train_network_ext")
    sections: dict[str, dict[str, Any]] = {
        "training": {"seed": 3},
        "evaluation": {"reference": "held=out/a", "count": 8, "first_seed": 5},
    }
    path = write(tmp_path / "a.toml", sections)
    args = parse(ext, monkeypatch, "--config", path, "--evaluation", "count=9", "size=64")
    assert dict(pair.split("=", 1) for pair in args.evaluation) == {
        "reference": "held=out/a",
        "count": "9",
        "first_seed": "5",
        "size": "64",
    }
    assert args.seed == 3 and not hasattr(args, "count")
    assert parse(ext, monkeypatch, "--config", path, "--evaluation", "enabled=false").evaluation is None
    sections["evaluation"]["enabled"] = False
    assert parse(ext, monkeypatch, "--config", write(tmp_path / "b.toml", sections)).evaluation is None
    wrong = {"evaluation": {"count": 1, "promts": "a.txt", "enabled": "no"}}
    with pytest.raises(SettingsError, match=r"\[evaluation\].*enabled = 'no'.*did you mean prompts.*count=1"):
        parse(ext, monkeypatch, "--config", write(tmp_path / "c.toml", wrong))
    with pytest.raises(SettingsError, match="--evaluation: size=100: must be a multiple of 64"):
        parse(ext, monkeypatch, "--evaluation", "size=100")


def test_adaptive_settings_bring_what_they_need_and_refuse_what_they_lack(
    sd_scripts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ext = importlib.import_module("train_network_ext")
    sections: dict[str, dict[str, Any]] = {
        "additional_network": {"network_module": "networks.lora_compress"},
        "quantization": {"bits": 8},
        "evaluation": {"reference": "held"},
        "adaptive": {"max_fid_gap": 0.1},
    }
    path = write(tmp_path / "a.toml", sections)
    args = parse(ext, monkeypatch, "--config", path, "--adaptive", "patience=3")
    assert args.adaptive == ["max_fid_gap=0.1", "patience=3"]
    given = dict(pair.split("=", 1) for pair in args.network_args)
    assert given == {"rank_ratio": "0.9", "iterative_pruning": "True", "rank_return": "True", "qat": "True", "bits": "8"}
    args = parse(ext, monkeypatch, "--config", path, "--pruning", "rank_ratio=0.7", "--quantization", "bits=4", "qat=false")
    given = dict(pair.split("=", 1) for pair in args.network_args)
    assert (given["rank_ratio"], given["bits"], given["qat"]) == ("0.7", "4", "false")
    assert parse(ext, monkeypatch, "--config", path, "--adaptive", "enabled=false").adaptive is None
    wrong = {
        "there are none: add a section": {**sections, "evaluation": {"enabled": False}},
        "network_module is networks.lora: set": {
            **sections,
            "additional_network": {"network_module": "networks.lora"},
            "quantization": {},
        },
        "window=1: must be 3 or more": {**sections, "adaptive": {"window": 1}},
        "strategy=mixed: its bits are chosen at saving": {**sections, "quantization": {"bits": 4, "strategy": "mixed"}},
    }
    for message, values in wrong.items():
        with pytest.raises(SettingsError, match=message):
            parse(ext, monkeypatch, "--config", write(tmp_path / "b.toml", values))
