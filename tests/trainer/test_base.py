"""Trainings on a packed base through the real sd-scripts, and what is refused before one begins."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_compress import LoraCompressError, load_lora
from tests import models
from tests.trainer.test_config import parse
from tests.trainer.test_train import config, model, pictures, train  # noqa: F401

STEPS = {"max_train_steps": 6, "network_dim": 4, "train_batch_size": 4, "learning_rate": 1e-3}


def losses(folder: Path) -> torch.Tensor:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = next(path.parent for path in (folder / "logs").rglob("events.out.tfevents.*"))
    return torch.tensor([event.value for event in EventAccumulator(str(logs)).Reload().Scalars("loss/current")])


def train_in(folder: Path, base: Path, pictures: Path, *flags: str, environment: dict[str, str] | None = None, **more: Any) -> str:  # noqa: F811
    folder.mkdir()
    return train(config(base, pictures, folder, logging_dir=str(folder / "logs"), **STEPS | more), *flags, **environment or {})


def test_training_on_an_int8_base_stays_close_and_resumes(sd_scripts: Path, pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    """tiny-sd, from the command line: six losses within 0.5 % of their mean; saved after three and resumed, they go on the same."""
    packed = ["--base_quantize", "int8", "--load_8bit_text_encoder"]
    train_in(tmp_path / "plain", models.TINY_SD, pictures)
    printed = train_in(tmp_path / "int8", models.TINY_SD, pictures, *packed, "--save_state", save_every_n_steps=3)
    assert "text encoder 1:" in printed and "frozen layers in int8" in " ".join(printed.split())
    plain, int8 = losses(tmp_path / "plain"), losses(tmp_path / "int8")
    assert len(plain) == 6 and not torch.equal(plain, int8)
    assert float((int8 - plain).abs().max() / plain.mean()) < 0.005

    full, small = (load_lora(tmp_path / name / "lora.safetensors") for name in ("plain", "int8"))
    assert small.updates.keys() == full.updates.keys() and len(small.updates) > 200
    assert (small.metadata["ss_compress_base_quantize"], small.metadata["ss_compress_8bit_text_encoder"]) == ("int8", "True")
    assert load_file(tmp_path / "int8" / "lora.safetensors").keys() == load_file(tmp_path / "plain" / "lora.safetensors").keys()

    state = tmp_path / "int8" / "lora-step00000003-state"
    kept = load_file(state / "model.safetensors")
    assert all(key.startswith("lora_") for key in kept) and len(list(state.glob("*.safetensors"))) == 1
    assert sum(path.stat().st_size for path in state.iterdir()) < 4 * sum(tensor.nbytes for tensor in kept.values())
    more = ["--skip_until_initial_step", "--save_state_on_train_end", f"--resume={state}"]
    train_in(tmp_path / "resumed", models.TINY_SD, pictures, *packed, *more)
    optimizer = torch.load(tmp_path / "resumed" / "lora-state" / "optimizer.bin", weights_only=True)
    assert {int(entry["step"]) for entry in optimizer["state"].values()} == {6}
    # the host draws other noise in the first step after resuming
    torch.testing.assert_close(losses(tmp_path / "resumed")[1:], int8[4:], rtol=0.02, atol=0)


@pytest.mark.parametrize("sd_scripts_at", ["v0.10.1", "v0.11.1"], indirect=True)
def test_nf4_with_what_else_saves_memory(sd_scripts_at: Path, model: Path, pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    """Options of the host that save memory, all at once and from a config; base_weights are merged before anything is packed."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    merged = {f"{name}.lora_down.weight": torch.rand(2, 64), f"{name}.lora_up.weight": torch.rand(64, 2)}
    save_file(merged | {f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "merged.safetensors")
    more = {
        "base_quantize": "nf4",
        "load_8bit_text_encoder": True,
        "base_weights": [str(tmp_path / "merged.safetensors")],
        "gradient_checkpointing": True,
        "full_bf16": True,
        "mixed_precision": "bf16",
        "lowram": True,
        "max_train_steps": 2,
    }
    environment = {"SD_SCRIPTS_DIR": str(sd_scripts_at), "PYTHONWARNINGS": "default"}
    printed = " ".join(train_in(tmp_path / "nf4", model, pictures, environment=environment, **more).split())
    assert printed.index("all weights merged") < printed.index("frozen layers in nf4")
    assert "is not an option of sd-scripts" not in printed and "reentrant" not in printed and "checkpoint.py" not in printed
    assert losses(tmp_path / "nf4").isfinite().all()
    assert all(update.down.any() for update in load_lora(tmp_path / "nf4" / "lora.safetensors").updates.values())


@pytest.fixture
def ext(sd_scripts: Path) -> ModuleType:
    return importlib.import_module("train_network_ext")


REFUSED = [
    (["--base_quantize=int8", "--fp8_base"], ["base_quantize=int8 and fp8_base both store the base"]),
    (["--base_quantize=nf4", "--fp8_base_unet"], ["base_quantize=nf4 and fp8_base_unet both store the base"]),
    (["--base_quantize=fp8"], ["base_quantize=fp8", "mixed_precision to bf16 or fp16"]),
    (["--load_8bit_text_encoder", "--fp8_base"], ["load_8bit_text_encoder and fp8_base both store the text encoders"]),
    (["--base_quantize=int8", "--network_module=networks.oft"], ["network_module=networks.oft, which may read the weights"]),
    (["--load_8bit_text_encoder", "--network_module=lycoris.kohya"], ["network_module=lycoris.kohya"]),
    (["--base_quantize=int8", "--deepspeed"], ["base_quantize and deepspeed"]),
    (["--base_quantize=fp8", "--deepspeed", "--network_module=networks.oft"], ["deepspeed", "networks.oft", "mixed_precision"]),
]


@pytest.mark.parametrize(("flags", "parts"), REFUSED, ids=lambda value: " ".join(value) if value[0].startswith("--") else "")
def test_contradictions_are_refused(ext: ModuleType, monkeypatch: pytest.MonkeyPatch, flags: list[str], parts: list[str]) -> None:
    module = [] if any("network_module" in flag for flag in flags) else ["--network_module=networks.lora_compress"]
    with pytest.raises(LoraCompressError) as caught:
        parse(ext, monkeypatch, *module, *flags)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("line", "message"),
    [("base_quantize = 'int9'", "one of int8, nf4, fp8"), ("load_8bit_text_encoder = 'yes'", "must be written true")],
)
def test_wrong_values_in_a_config(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "a.toml").write_text(f"[network]\nnetwork_module = 'networks.lora_compress'\n{line}\n", encoding="utf-8")
    with pytest.raises(LoraCompressError, match=message):
        parse(ext, monkeypatch, "--config_file", str(tmp_path / "a.toml"))


def test_without_bitsandbytes(ext: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    module = "--network_module=networks.lora_compress"
    for flag in ("--base_quantize=nf4", "--load_8bit_text_encoder"):
        with pytest.raises(LoraCompressError, match="needs bitsandbytes, which is not installed: pip install"):
            parse(ext, monkeypatch, module, flag)
    assert parse(ext, monkeypatch, module, "--base_quantize=fp8", "--mixed_precision=bf16").base_quantize == "fp8"


FP8 = {
    "train_network.NetworkTrainer": "fp8_base_unet",
    "flux_train_network.FluxNetworkTrainer": "fp8_base_unet",
    "hunyuan_image_train_network.HunyuanImageNetworkTrainer": "fp8_scaled",
    "anima_train_network.AnimaNetworkTrainer": None,
}


@pytest.mark.parametrize("trainer", FP8)
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_fp8_is_the_hosts_where_it_has_one(sd_scripts: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, gpu: bool) -> None:
    """On a GPU: torch has no norms in fp8 on a CPU, where the host's ends in an error."""
    from library.compress_base import BaseModelMixin
    from lora_compress.frozen import is_frozen

    script, name = trainer.split(".")
    host = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    args = argparse.Namespace(
        **vars(host.setup_parser().parse_args([])) | {"base_quantize": "fp8", "load_8bit_text_encoder": False}
    )
    args.model_type, args.mixed_precision = "flux", "bf16"
    dataset = SimpleNamespace(verify_bucket_reso_steps=lambda steps: None, is_text_encoder_output_cacheable=lambda **_: True)
    ours = type(name, (BaseModelMixin, getattr(host, name)), {})()
    ours.assert_extra_args(args, dataset, None)
    option = FP8[trainer] if gpu else None
    assert [given for given in ("fp8_base_unet", "fp8_scaled") if getattr(args, given, False)] == ([option] if option else [])

    base = torch.nn.Sequential(torch.nn.Linear(64, 64))
    network, accelerator = SimpleNamespace(train_t5xxl=False), SimpleNamespace(device=torch.device("cpu"))
    ours.post_process_network(args, accelerator, network, [], base)
    assert is_frozen(base[0]) == (option is None)
