"""States of a training under the real sd-scripts: killed while one is saved, damaged, of another training, and NaN."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_compress import CompressionSettings, FormatError, SettingsError, load_lora
from tests.trainer.test_train import config, model, pictures, run

__all__ = ["model", "pictures"]

# An optimizer that sd-scripts finds by its name; it ends the process while its state is saved, or breaks the weights.
OPTIMIZER = """
import os, signal
import torch

class Broken(torch.optim.AdamW):
    done = saved = 0

    def step(self, closure=None):
        super().step(closure)
        Broken.done += 1
        if Broken.done == int(os.environ.get("NAN_AT", 0)):
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))

    def state_dict(self):
        Broken.saved += "KILL_AT" in os.environ
        if Broken.saved and Broken.done == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().state_dict()
"""
LEARNING = ["--pruning", "rank_ratio=0.5", "min_rank=0", "iterative_pruning=true", "max_iterations=1"]
LEARNING += ["--quantization", "bits=4", "qat=true", "--network_train_unet_only"]
STATES = ["--save_state", "--save_every_n_steps=1"]


def start(flags: list[str], status: int, **environment: str) -> str:
    """What our trainer printed; the accelerate launcher would add a traceback of its own."""
    return run([sys.executable, "train_network_ext.py", *flags], status=status, **environment)


def error_of(printed: str) -> str:
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed
    return error


@pytest.fixture(scope="module")
def optimizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("optimizer")
    (folder / "broken_optimizer.py").write_text(OPTIMIZER, encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def killed(
    sd_scripts: Path, model: Path, pictures: Path, optimizer: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of a training that was killed while it wrote its second state, between the weights and the optimizer."""
    folder = tmp_path_factory.mktemp("killed")
    flags = config(model, pictures, folder, max_train_steps=3, optimizer_type="broken_optimizer.Broken")
    start([*flags, *LEARNING, *STATES], -signal.SIGKILL, KILL_AT="2", **optimizer)
    return folder


@pytest.fixture
def state(killed: Path, tmp_path: Path) -> Path:
    """A copy of a whole state, with another whole one beside it."""
    for name in ("lora-step00000001-state", "lora-state"):
        shutil.copytree(killed / "lora-step00000001-state", tmp_path / name)
    return tmp_path / "lora-state"


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_kill_while_a_state_is_saved_leaves_the_one_before(killed: Path, model: Path, pictures: Path, tmp_path: Path) -> None:
    from library.compress_resume import check_state

    half = killed / ".lora-step00000002-state.tmp"
    assert (half / "model.safetensors").is_file() and not (half / "optimizer.bin").exists()
    assert sorted(path.name for path in killed.glob("*-state")) == ["lora-step00000001-state"]
    check_state(killed / "lora-step00000001-state")
    told = error_of(start([*config(model, pictures, tmp_path), *LEARNING, f"--resume={half}"], 2))
    assert f"resume={half}: the state is unfinished, optimizer.bin, scheduler.bin, random_states_0.pkl missing" in told
    assert f"the newest whole state beside it is {killed / 'lora-step00000001-state'}: resume from that" in told


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def flip(folder: Path) -> None:
    data = bytearray((folder / "optimizer.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "optimizer.bin").write_bytes(data)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "absent": (shutil.rmtree, "there is no such folder"),
    "empty": (empty, "holds no state of a training .found: nothing; needed: model.safetensors, optimizer.bin"),
    "file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "is a file: a state is a folder"),
    "weights cut short": (cut("model.safetensors"), "model.safetensors: [0-9,]+ bytes of tensors are there, [0-9,]+ are due"),
    "optimizer cut short": (
        cut("optimizer.bin"),
        "optimizer.bin: [0-9,]+ bytes that torch.save has not written, or not to the end",
    ),
    "optimizer changed": (flip, "optimizer.bin: the checksum of .* is wrong"),
    "schedule cut short": (cut("scheduler.bin"), "scheduler.bin: "),
    "step cut short": (cut("train_state.json"), "train_state.json: no JSON object"),
    "no weights": (lose("model.safetensors"), "the state is unfinished, model.safetensors missing"),
    "no random states": (lose("random_states_0.pkl"), "the state is unfinished, random_states_0.pkl missing"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_refused_and_the_whole_one_beside_it_is_named(
    state: Path, damage: Callable[[Path], object], message: str
) -> None:
    from library.compress_resume import check_state

    check_state(state)
    damage(state)
    with pytest.raises(FormatError, match=f"^resume={state}: .*{message}.*lora-step00000001-state: resume from that$"):
        check_state(state)
    shutil.rmtree(state.parent / "lora-step00000001-state")
    with pytest.raises(FormatError, match=r"no whole state is beside it: start a training from .* --network_weights$"):
        check_state(state)


@pytest.mark.parametrize(
    ("more", "flags", "message"),
    [
        ({"network_dim": 4}, LEARNING, "network_dim is 8 in the state and 4 in this training"),
        (
            {},
            ["--network_train_unet_only"],
            "it was made with iterative_pruning, qat or collect_calibration, this training is without",
        ),
    ],
    ids=["rank", "no compression"],
)
def test_a_state_of_another_training_is_refused(
    killed: Path, model: Path, pictures: Path, tmp_path: Path, more: dict[str, object], flags: list[str], message: str
) -> None:
    resume = killed / "lora-step00000001-state"
    told = error_of(start([*config(model, pictures, tmp_path, **more), *flags, f"--resume={resume}"], 2))
    assert str(resume / "model.safetensors") in told and message in told and "--network_weights" in told
    assert not list(tmp_path.glob("*.safetensors"))


class Accelerated:
    """A network of one tensor beside the others of a state, prepared by accelerate and guarded as in a training."""

    def __init__(
        self, tensors: dict[str, torch.Tensor], kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: object
    ) -> None:
        from accelerate import Accelerator

        from library.compress_resume import guard_states

        self.network = nn.Module()
        for key, tensor in tensors.items():
            parent = self.network
            *names, last = key.split(".")
            for name in names:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = getattr(parent, name)
            parent.register_buffer(last, tensor.clone())
        self.network.weight = nn.Parameter(torch.zeros(1))
        if settings:
            self.network.compression = CompressionSettings.parse(settings)
        self.accelerator = Accelerator(cpu=True)
        guard_states(argparse.Namespace(), self.accelerator, self.network)
        optimizer = kind([self.network.weight])
        self.accelerator.prepare(self.network, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))


TENSORS = {"a.lora_down.weight": torch.ones(8, 3), "a.lora_up.weight": torch.ones(3, 8), "compress_training.kept": torch.ones(8)}
SETTINGS = {"rank_ratio": 0.5, "iterative_pruning": True, "qat": True, "bits": 4}
OTHERS = {
    "bits": (TENSORS, SETTINGS | {"bits": 8}, "bits is 4 in the state and 8 in this training"),
    "pruning": (TENSORS, SETTINGS | {"rank_ratio": 0.25}, "rank_ratio is 0.5 in the state and 0.25 in this training"),
    "network": (
        {key.replace("a.lora", "b.lora"): tensor for key, tensor in TENSORS.items()},
        SETTINGS,
        "tensors are only in this training",
    ),
    "more": (TENSORS | {"c.lora_up.weight": torch.ones(2)}, SETTINGS, "1 tensors are only in this training, such as c.lora_up"),
    "fewer": (
        {"a.lora_up.weight": torch.ones(3, 8), "compress_training.kept": torch.ones(8)},
        SETTINGS,
        "only in the state, such as a",
    ),
    "masks": (
        TENSORS | {"compress_training.kept": torch.ones(4)},
        SETTINGS,
        r"kept has shape \[8\] in the state and \[4\] in this",
    ),
}


@pytest.mark.parametrize(("tensors", "settings", "message"), OTHERS.values(), ids=OTHERS)
def test_nothing_is_loaded_from_a_state_of_another_network_or_of_other_settings(
    sd_scripts: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, object], message: str
) -> None:
    folder = tmp_path / "lora-state"
    first = Accelerated(TENSORS, **SETTINGS)
    first.accelerator.save_state(str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["lora-state"]
    Accelerated(TENSORS, **SETTINGS | {"save_format": "kohya"}).accelerator.load_state(str(folder))  # concerns files alone

    other = Accelerated({key: 0 * tensor for key, tensor in tensors.items()}, **settings)
    with pytest.raises(SettingsError, match=f"^resume: .*{message}") as caught:
        other.accelerator.load_state(str(folder))
    assert str(folder) in str(caught.value) and "--network_weights" in str(caught.value)
    assert not any(tensor.any() for tensor in other.network.state_dict().values())


def test_the_state_of_another_optimizer_is_refused(sd_scripts: Path, tmp_path: Path) -> None:
    """torch would load it: of AdamW's averages SGD takes none, and the training would start anew without a word."""
    Accelerated(TENSORS, **SETTINGS).accelerator.save_state(str(tmp_path / "state"))
    with pytest.raises(SettingsError, match=r"optimizer is \['AdamW'\] in the state and \['SGD'\] in this training"):
        Accelerated(TENSORS, torch.optim.SGD, **SETTINGS).accelerator.load_state(str(tmp_path / "state"))


def test_a_state_without_our_settings_is_compared_by_its_tensors(sd_scripts: Path, tmp_path: Path) -> None:
    """As sd-scripts' own script saves it."""
    folder = tmp_path / "lora-state"
    Accelerated(TENSORS, **SETTINGS).accelerator.save_state(str(folder))
    (folder / "compress_settings.json").unlink()
    save_file({key: 2 * tensor for key, tensor in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors")
    second = Accelerated(TENSORS, **SETTINGS | {"bits": 8})
    second.accelerator.load_state(str(folder))
    assert bool((second.network.state_dict()["a.lora_up.weight"] == 2).all())


def test_weights_that_become_nan_are_not_saved(
    sd_scripts: Path, model: Path, pictures: Path, optimizer: dict[str, str], tmp_path: Path
) -> None:
    """Nothing is compressed; the file and the state of the step before stay, and are whole."""
    from library.compress_resume import check_state

    flags = config(model, pictures, tmp_path, max_train_steps=3, optimizer_type="broken_optimizer.Broken")
    told = error_of(start([*flags, *STATES, "--network_train_unet_only"], 2, NAN_AT="2", **optimizer))
    file = tmp_path / "lora-step00000002.safetensors"
    assert f"{file}: not saved: after step 2 lora_unet_" in told
    assert "NaN or infinity: the training diverged" in told and "learning_rate" in told
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora-step00000001.safetensors"]
    assert all(update.down.isfinite().all() for update in load_lora(tmp_path / "lora-step00000001.safetensors").updates.values())
    check_state(tmp_path / "lora-step00000001-state")
    assert json.loads((tmp_path / "lora-step00000001-state" / "train_state.json").read_text())["current_step"] == 1
    assert [path.name for path in tmp_path.glob("*-state")] == ["lora-step00000001-state"]
