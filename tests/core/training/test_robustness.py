"""Trainings that went wrong: NaN is not saved, states of other trainings are not loaded, kills leave a whole state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from core.training.nets import Net, train

from lora_compress import CompressionSettings, FormatError, SettingsError, save
from lora_compress.training import TrainingSession
from lora_compress.training.state_folder import whole_folder

PRUNING = {"iterative_pruning": True, "rank_ratio": 0.5, "min_rank": 1}
QAT = {"qat": True, "qat_start": 0.3, "bits": 4}


def trained(rank: int = 6, steps: int = 12, **values: Any) -> tuple[Net, TrainingSession]:
    net = Net(rank=rank)
    session = TrainingSession(net.pairs(), CompressionSettings.parse(values), 12)
    train(net, torch.optim.AdamW(net.parameters_of_pairs(), lr=1e-2), range(steps))
    return net, session


@pytest.mark.parametrize("values", [{}, PRUNING, QAT, PRUNING | QAT, {"bits": 4}, QAT | {"strategy": "entropy"}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_saved(values: dict[str, Any], bad: float, tmp_path: Path) -> None:
    _, session = trained(**values)
    path = tmp_path / "lora.safetensors"
    save(session.compress(), path)
    before = path.read_bytes()
    session.pairs["first"].weights[1].data[3, int(session.kept("first").nonzero()[0])] = bad
    with pytest.raises(FormatError, match=r"^first: .*NaN or infinity: the training diverged"):
        save(session.compress(), path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"rank": 4, **PRUNING}, "kept"),
        ({**PRUNING, **QAT}, "down_grid, up_grid"),
        ({**PRUNING, "importance": "sensitivity"}, "sensitivity"),
    ],
)
def test_a_state_of_other_settings_is_refused_as_a_whole(other: dict[str, Any], named: str) -> None:
    _, session = trained(**PRUNING)
    _, fresh = trained(steps=0, **other)
    before = {name: buffer.clone() for name, buffer in fresh.state.state_dict().items()}
    with pytest.raises(SettingsError, match=rf"^resume: {named} differ: the state is of another network or of other pruning"):
        fresh.state.load_state_dict(session.state.state_dict())
    assert all(torch.equal(buffer, before[name]) for name, buffer in fresh.state.state_dict().items()) and fresh.step == 0


def test_a_kill_while_a_state_is_saved_leaves_the_one_before(tmp_path: Path) -> None:
    progress = pytest.importorskip("lora_compress.trainer.progress")
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    folder = tmp_path / "lora-state"

    def write(text: str, *, stop: bool = False) -> None:
        with whole_folder(folder, accelerator) as temporary:
            (temporary / "custom_checkpoint_0.pkl").write_text(text)
            if stop:
                raise KeyboardInterrupt
            (temporary / "model.safetensors").write_text(text)

    write("first")
    with pytest.raises(KeyboardInterrupt):
        write("second", stop=True)
    progress.check_state_folder(folder)
    assert (folder / "model.safetensors").read_text() == "first"
    with pytest.raises(FormatError, match="unfinished, saving it was interrupted"):
        progress.check_state_folder(tmp_path / ".lora-state.tmp")
    write("third")
    assert (folder / "model.safetensors").read_text() == "third" and [path.name for path in tmp_path.iterdir()] == ["lora-state"]
    folder.rename(tmp_path / ".lora-state.old")  # a kill between the two renamings
    progress.check_state_folder(folder)
    assert (folder / "model.safetensors").read_text() == "third"
    (tmp_path / "empty").mkdir()
    for absent in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(FormatError, match="holds no state of --host diffusers"):
            progress.check_state_folder(absent)
