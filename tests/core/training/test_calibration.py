"""The calibration file of a training: second moments of the inputs, for the weights that were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_compress import CompressionSettings, SettingsError, compress_file, load_lora, save
from lora_compress.training import TrainingSession, write_calibration
from lora_compress.weighting import Calibration
from tests.core.training.nets import Net, batch, train


@pytest.mark.parametrize("values", [{"rank_ratio": 0.9, "min_rank": 1}, {"qat": True, "bits": 4}], ids=["plain", "qat"])
def test_the_moments_are_those_of_the_inputs_at_the_end(values: dict[str, Any], tmp_path: Path) -> None:
    net = Net(rank=4)
    session = TrainingSession(net.pairs(), CompressionSettings.parse(values | {"collect_calibration": True}), 400)
    train(net, torch.optim.AdamW(net.parameters_of_pairs(), lr=1e-3), range(400))
    assert session.calibrated
    file = tmp_path / "lora.safetensors"
    save(session.compress(), file)
    calibration = Calibration(write_calibration(session, file))
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in session.pairs}
    for name, pair in session.pairs.items():
        pair.down.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].detach()))
    with torch.no_grad():
        for step in range(360, 400):
            net(batch(step)[0])
    for name, update in load_lora(file).updates.items():
        x = torch.cat(inputs[name])
        vectors = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1) if name == "conv" else x
        reached = vectors.double() @ update.down_matrix.double().T
        expected = reached.T @ reached / len(reached)
        gram = calibration.gram(name, update)
        assert float((gram - expected).norm() / expected.norm()) < 0.5  # 64 of some hundred vectors
        channels = x.square().mean(dim=(0, 2, 3)) if name == "conv" else x.square().mean(dim=0)
        moved = session.state.part("squares", name) - channels  # what reaches the later layers changed in these steps
        assert float(moved.norm() / channels.norm()) < (1e-4 if name == "conv" else 0.25)


def test_the_file_is_what_the_engine_takes(tmp_path: Path) -> None:
    net = Net(rank=4)
    session = TrainingSession(net.pairs(), CompressionSettings.parse({"rank_ratio": 0.9, "collect_calibration": True}), 40)
    train(net, torch.optim.AdamW(net.parameters_of_pairs(), lr=1e-3), range(40))
    file = tmp_path / "lora.safetensors"
    save(session.compress(), file)
    calibration = write_calibration(session, file)
    out = tmp_path / "small.safetensors"
    settings = CompressionSettings.parse({"rank_ratio": 0.5, "min_rank": 1})
    compress_file(str(file), str(out), settings, calibration=str(calibration))
    before, after = (sum(update.rank for update in load_lora(path).updates.values()) for path in (file, out))
    assert after < before


def test_nothing_is_written_before_anything_was_seen(tmp_path: Path) -> None:
    net = Net()
    session = TrainingSession(net.pairs(), CompressionSettings.parse({"collect_calibration": True}), 40)
    optimizer = torch.optim.AdamW(net.parameters_of_pairs(), lr=1e-3)
    train(net, optimizer, range(20))
    assert not session.calibrated and not net.first.down._forward_pre_hooks
    save(session.compress(), tmp_path / "lora.safetensors")
    with pytest.raises(SettingsError, match="no input was seen"):
        write_calibration(session, tmp_path / "lora.safetensors")
    train(net, optimizer, range(20, 37))
    assert net.first.down._forward_pre_hooks and session.calibrated
    session.close()
    assert not net.first.down._forward_pre_hooks
