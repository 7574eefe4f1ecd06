"""Pruning and quantization while the host's own network learns on its own U-Net, by the host's contract alone."""

from __future__ import annotations

import argparse
import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import narrow_unet
from safetensors.torch import load_file

from lora_compress import FormatError, SettingsError, load_lora

STEPS = 10
PRUNING = {"iterative_pruning": "True", "rank_ratio": "0.5", "min_rank": "0", "max_iterations": "2"}
QAT = {"qat": "True", "bits": "4", "qat_refresh": "2"}


@pytest.fixture
def unet(sd_scripts: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """sd-scripts' SD1.x U-Net, 32 to 64 channels wide."""
    return narrow_unet(monkeypatch)


class Training:
    """What sd-scripts' train_network.py does with a network, in its order, under accelerate."""

    def __init__(self, unet: Any, folder: Path, module: str = "networks.lora_compress", **network_args: str) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        self.unet, self.accelerator = unet, Accelerator(cpu=True)
        self.args = argparse.Namespace(
            save_model_as="safetensors", save_precision="float", output_dir=str(folder), max_train_steps=1, deepspeed=False
        )
        unet.requires_grad_(False)
        torch.manual_seed(2)
        network = importlib.import_module(module).create_network(
            1.0, 4, 2, None, torch.nn.Identity(), unet, neuron_dropout=None, dropout=None, **network_args
        )
        if hasattr(network, "prepare_network"):
            network.prepare_network(self.args)
        network.apply_to(None, unet, False, True)
        groups, _ = network.prepare_optimizer_params(None, 1e-2, 1e-2)
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.args.max_train_steps = STEPS  # as the host turns epochs into steps: after prepare_network
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        network.prepare_grad_etc(None, unet)
        network.on_epoch_start(None, unet)
        self.losses: list[float] = []

    def step(self) -> None:
        generator = torch.Generator().manual_seed(len(self.losses))
        noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
        with self.accelerator.accumulate(self.network):
            loss = (self.unet(noisy, torch.tensor([500, 20]), text).sample - noisy.roll(1, 2)).square().mean()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.network.get_trainable_params(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))

    def run(self, until: int = STEPS) -> Training:
        while len(self.losses) < until:
            self.step()
        return self

    def detach(self) -> None:
        """Give the U-Net its own forwards back, for the next network."""
        for lora in self.network.unet_loras:
            lora.org_forward.__self__.__dict__.pop("forward", None)


def test_a_training_by_the_hosts_contract_prunes_quantizes_and_saves_what_it_computed_with(unet: Any, tmp_path: Path) -> None:
    training = Training(unet, tmp_path, **PRUNING, **QAT).run()
    session = training.network.session
    assert session.step == STEPS and session.quantizing
    kept = {name: int(session.kept(name).sum()) for name in session.pairs}
    assert sum(kept.values()) == sum(pair.rank for pair in session.pairs.values()) // 2
    assert len(set(kept.values())) > 1
    file = tmp_path / "lora.safetensors"
    training.network.save_weights(str(file), None, {"ss_network_dim": "4"})
    loaded = load_lora(file)
    assert loaded.metadata["ss_compress_qat"] == "true" and 0.0 < float(loaded.metadata["ss_compress_relative_error"]) < 1.0
    assert {name: update.rank for name, update in loaded.updates.items()} == {n: k for n, k in kept.items() if k}

    noisy, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    with torch.no_grad():
        training.network.eval()
        trained = unet(noisy, torch.tensor([500]), text).sample
    training.detach()
    module = importlib.import_module("networks.lora_compress")
    again, weights = module.create_network_from_weights(1.0, str(file), None, torch.nn.Identity(), unet, for_inference=True)
    again.apply_to(None, unet, False, True)
    assert not again.load_state_dict(weights, False).unexpected_keys
    assert again.session is None
    with torch.no_grad():
        drawn = unet(noisy, torch.tensor([500]), text).sample
    assert torch.allclose(drawn, trained, atol=1e-4)  # sums of other lengths


def test_with_a_session_that_waits_training_is_the_hosts(unet: Any, tmp_path: Path) -> None:
    late = {"qat": "True", "bits": "4", "qat_start": "0.9"}
    ours = Training(unet, tmp_path, **late).run(8)
    ours.detach()
    theirs = Training(unet, tmp_path, module="networks.lora").run(8)
    assert ours.losses == theirs.losses


RESUMED = {
    "both": PRUNING | QAT,
    "sensitivity": PRUNING | {"importance": "sensitivity", "rank_return": "True"},
    "activation": PRUNING | {"importance": "activation"},
    "entropy": {"qat": "True", "bits": "3", "strategy": "entropy", "qat_start": "0.3", "qat_refresh": "2"},
}


@pytest.mark.parametrize(("name", "stop"), [("both", 8), ("sensitivity", 4), ("activation", 4), ("entropy", 7)])
def test_a_run_that_was_killed_and_resumed_ends_like_one_that_was_not(unet: Any, tmp_path: Path, name: str, stop: int) -> None:
    settings = RESUMED[name] | {"collect_calibration": "True"}
    whole = Training(unet, tmp_path, **settings).run()
    whole.detach()
    first = Training(unet, tmp_path, **settings).run(stop)
    first.accelerator.save_state(str(tmp_path / "state"))
    first.detach()
    first.network.session.close()
    second = Training(unet, tmp_path, **settings)
    second.accelerator.load_state(str(tmp_path / "state"))
    second.losses = first.losses[:]
    second.run()
    assert second.losses == whole.losses
    ends = [training.network.state_dict() for training in (whole, second)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    for training, file in ((whole, "whole"), (second, "second")):
        training.network.save_weights(str(tmp_path / f"{file}.safetensors"), None, {})
    files = [load_lora(tmp_path / f"{file}.safetensors").updates for file in ("whole", "second")]
    assert all(torch.equal(files[0][key].down, files[1][key].down) for key in files[0])


def test_a_state_from_before_loads_and_the_lora_file_of_the_host_holds_no_state(unet: Any, tmp_path: Path) -> None:
    plain = Training(unet, tmp_path, module="networks.lora").run(2)
    plain.accelerator.save_state(str(tmp_path / "state"))
    plain.detach()
    training = Training(unet, tmp_path, **PRUNING)
    training.accelerator.load_state(str(tmp_path / "state"))
    assert training.network.session.step == 0
    training.run(3)
    training.detach()
    only = Training(unet, tmp_path, collect_calibration="True").run()
    only.network.save_weights(str(tmp_path / "lora.safetensors"), torch.float16, {"ss_network_dim": "4"})
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "lora.safetensors"))
    assert (tmp_path / "lora.calibration.safetensors").exists()
    assert "compress_training.samples" in only.network.state_dict()


def test_checkpoints_between_are_compressed_as_the_training_stands(unet: Any, tmp_path: Path) -> None:
    training = Training(unet, tmp_path, **PRUNING, bits="8")
    ranks = []
    for step in (1, 4, STEPS):
        training.run(step)
        training.network.save_weights(str(tmp_path / "lora.safetensors"), None, {})
        ranks.append(sum(update.rank for update in load_lora(tmp_path / "lora.safetensors").updates.values()))
    total = sum(pair.rank for pair in training.network.session.pairs.values())
    assert ranks[0] == total > ranks[1] >= ranks[2] == total // 2
    metadata = load_lora(tmp_path / "lora.safetensors").metadata
    assert json.loads(metadata["ss_compress_trained_steps"]) == STEPS


ACTING = [QAT, {"iterative_pruning": "true", "rank_ratio": "0.5"}, {"collect_calibration": "true"}]


@pytest.mark.parametrize("network_args", [*ACTING, {}])
def test_what_acts_in_training_is_refused_under_deepspeed(unet: Any, tmp_path: Path, network_args: dict[str, str]) -> None:
    create = importlib.import_module("networks.lora_compress").create_network
    network = create(1.0, 4, 2, None, torch.nn.Identity(), unet, **network_args)
    given = {"save_model_as": "safetensors", "save_precision": None, "output_dir": str(tmp_path), "max_train_steps": 1}
    args = argparse.Namespace(**given, deepspeed=True, zero_stage=2)
    with pytest.raises(SettingsError, match="deepspeed cannot be used with") if network_args else nullcontext():
        network.prepare_network(args)


@pytest.mark.parametrize("settings", [{}, PRUNING, {"bits": "4"}], ids=["as the host", "pruned", "quantized"])
def test_weights_that_are_not_finite_are_not_saved(unet: Any, tmp_path: Path, settings: dict[str, str]) -> None:
    run = Training(unet, tmp_path, **settings).run(1)
    path = tmp_path / "lora.safetensors"
    run.network.save_weights(str(path), None, {})
    before = path.read_bytes()
    with torch.no_grad():
        run.network.unet_loras[0].lora_up.weight[0, 0] = torch.nan
    with pytest.raises(FormatError, match="NaN or infinity: the training diverged"):
        run.network.save_weights(str(path), None, {})
    assert path.read_bytes() == before
