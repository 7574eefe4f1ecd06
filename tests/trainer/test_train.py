"""Trainings through the real, unmodified sd-scripts: ours and its own scripts, narrow models and one of full size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toml
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_compress import load_lora
from lora_compress.evaluation.shapes import write_dataset
from tests import models
from tests.trainer.test_config import LORA_SCRIPTS

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process=1"]


@pytest.fixture(scope="session")
def model(sd_scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_random_sd(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_dataset(folder, count=4, repeats=1)
    return folder


def config(model: Path, pictures: Path, folder: Path, **more: object) -> list[str]:
    """A config file in `folder` for five steps, and the flag that names it."""
    values = {
        "pretrained_model_name_or_path": str(model),
        "tokenizer_cache_dir": str(models.TOKENIZER_CACHE),
        "train_data_dir": str(pictures),
        "caption_extension": ".txt",
        "resolution": "64,64",
        "train_batch_size": 2,
        "max_data_loader_n_workers": 0,
        "network_module": "networks.lora_compress",
        "network_dim": 8,
        "network_alpha": 4,
        "max_train_steps": 5,
        "learning_rate": 1e-2,
        "optimizer_type": "AdamW",
        "mixed_precision": "no",
        "seed": 1,
        "output_dir": str(folder),
        "output_name": "lora",
        "save_model_as": "safetensors",
        **more,
    }
    (folder / "train.toml").write_text(toml.dumps(values), encoding="utf-8")
    return [f"--config_file={folder / 'train.toml'}"]


def run(command: list[str], *, status: int = 0, cwd: Path = ROOT, **environment: str) -> str:
    """What the command printed; fails unless it ends with `status`."""
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run(command, cwd=cwd, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == status, done.stdout[-6000:]
    return done.stdout


def train(flags: list[str], *more: str, **environment: str) -> str:
    """Run our trainer under accelerate, as a user does."""
    return run([*LAUNCH, "train_network_ext.py", *flags, *more], **environment)


def run_stock(script: str, root: Path, repair: Path, model: Path, flags: list[str]) -> str:
    """Run sd-scripts' own script in its own folder, our packages on PYTHONPATH and the model's U-Net widths as its constants."""
    widths = json.loads((model / "unet" / "config.json").read_text())["block_out_channels"]
    code = (
        "import runpy, sys\n"
        "sys.path.insert(0, '')\n"
        "import library.original_unet as unet\n"
        f"unet.BLOCK_OUT_CHANNELS, unet.TIMESTEP_INPUT_DIM, unet.TIME_EMBED_DIM = {widths}, {widths[0]}, {4 * widths[0]}\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    path = f"{repair}{os.pathsep}{ROOT}"
    return run([sys.executable, "-c", code, script, *flags], cwd=root, PYTHONPATH=path, SD_SCRIPTS_DIR="")


@pytest.mark.parametrize("sd_scripts_at", ["v0.10.1", "v0.11.1"], indirect=True)
def test_our_launcher_trains_saves_and_tells_the_trackers(sd_scripts_at: Path, model: Path, pictures: Path, tmp_path: Path) -> None:
    more = {
        "logging_dir": str(tmp_path / "logs"),
        "pruning": {"enabled": True, "rank_ratio": 0.5, "min_rank": 0},
        "quantization": {"enabled": True, "bits": 4, "strategy": "nf4", "save_format": "both"},
        "save_precision": "fp16",
    }
    flags = [*config(model, pictures, tmp_path, **more), "--save_every_n_steps=2", "--save_last_n_steps=1"]
    printed = train(flags, SD_SCRIPTS_DIR=str(sd_scripts_at))
    for part in ("expected file size", "compressed LoRA", "opens in: LoRA Compress alone", "opens in: ComfyUI"):
        assert part in printed

    file = load_lora(tmp_path / "lora.safetensors")
    metadata = file.metadata
    assert file.packed and metadata["ss_network_module"] == "networks.lora_compress"
    assert metadata["ss_compress_strategy"] == "nf4" and metadata["ss_network_dim"] == "Dynamic"
    kept, components = map(int, metadata["ss_compress_components"].split("/"))
    assert sum(update.rank for update in file.updates.values()) == kept == components // 2
    partner = load_lora(tmp_path / "lora.kohya.safetensors")
    assert {update.down.dtype for update in partner.updates.values()} == {torch.float16}

    saved = {path.name for path in tmp_path.glob("*.safetensors")}
    assert {name.replace(".kohya", "") for name in saved if ".kohya" in name} == {name for name in saved if ".kohya" not in name}
    assert "lora-step00000002.safetensors" not in saved  # the host removed it, and its partner went with it

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = next(path.parent for path in (tmp_path / "logs").rglob("events.out.tfevents.*"))
    accumulator = EventAccumulator(str(logs)).Reload()
    error = accumulator.Scalars("compress/relative_error")[-1].value
    assert error == pytest.approx(float(metadata["ss_compress_relative_error"]), rel=1e-4)
    size = accumulator.Scalars("compress/bytes_after")[-1].value
    assert size == pytest.approx((tmp_path / "lora.safetensors").stat().st_size)


def test_a_lora_scripts_config_trains(sd_scripts: Path, model: Path, pictures: Path, tmp_path: Path) -> None:
    """As it is but for the paths and what needs a GPU: xformers, AdamW8bit and fp16."""
    changed = {
        "model_arguments": {"pretrained_model_name_or_path": str(model), "tokenizer_cache_dir": str(models.TOKENIZER_CACHE)},
        "dataset_arguments": {"train_data_dir": str(pictures), "resolution": "256,256"},
        "optimizer_arguments": {"optimizer_type": "AdamW"},
        "training_arguments": {"xformers": False, "mixed_precision": "no", "max_train_epochs": 1},
        "saving_arguments": {"output_dir": str(tmp_path / "output"), "logging_dir": str(tmp_path / "logs")},
    }
    sections = {name: {**section, **changed.get(name, {})} for name, section in LORA_SCRIPTS.items()}
    (tmp_path / "lora.toml").write_text(toml.dumps(sections), encoding="utf-8")
    flags = ["--network_module=networks.lora_compress", "--pruning", "rank_ratio=0.5", "--quantization", "bits=8"]
    printed = train([f"--config_file={tmp_path / 'lora.toml'}"], *flags)
    assert "lr_restart_cycles" in printed
    assert load_lora(tmp_path / "output" / "output_name.safetensors").packed


@pytest.mark.parametrize("sd_scripts_at", ["v0.10.1", "v0.11.1"], indirect=True)
def test_sdxl(sd_scripts_at: Path, sd_scripts: Path, pictures: Path, tmp_path: Path) -> None:
    """U-Net and both text encoders, the model type told from the folder."""
    model = models.write_random_sdxl(tmp_path / "model")
    more = {"tokenizer_cache_dir": str(model / "tokenizer_cache"), "max_train_steps": 2, "no_half_vae": True}
    flags = ["--quantization", "bits=4", "--pruning", "rank_ratio=0.5"]
    printed = train(config(model, pictures, tmp_path, **more), *flags, SD_SCRIPTS_DIR=str(sd_scripts_at))
    assert all(part in printed for part in ("text encoder 1", "text encoder 2", "U-Net"))
    file = load_lora(tmp_path / "lora.safetensors")
    assert file.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert {name.split("_")[1] for name in file.updates} == {"unet", "te1", "te2"}


@pytest.mark.parametrize("sd_scripts_at", ["v0.10.1", "v0.11.1"], indirect=True)
def test_flux(sd_scripts_at: Path, sd_scripts: Path, pictures: Path, tmp_path: Path) -> None:
    """Transformer, split, and CLIP-L; the model type told from the checkpoint, the sizes from the four files."""
    options = models.write_random_flux(tmp_path / "model")
    model = Path(options["pretrained_model_name_or_path"])
    more = {**options, "t5xxl_max_token_length": 32, "guidance_scale": 1.0, "max_train_steps": 3, "cache_latents": True}
    more |= {"network_args": ["split_qkv=True", "train_double_block_indices=1"], "quantization": {"bits": 4, "strategy": "nf4"}}
    printed = train(config(model, pictures, tmp_path, **more), "--pruning", "rank_ratio=0.5", SD_SCRIPTS_DIR=str(sd_scripts_at))
    assert all(part in printed for part in ("text encoder 1", "DiT", "expected file size"))
    file = load_lora(tmp_path / "lora.safetensors")
    assert file.packed and file.metadata["ss_base_model_version"] == "flux1" and file.metadata["ss_model_type"] == "flux"
    assert {name.split("_")[1] for name in file.updates} == {"unet", "te1"}
    layers = [name for name in file.updates if name.startswith("lora_unet")]
    assert not any("double_blocks_0" in name for name in layers) and len(layers) == 10 + 2 * 3
    single = file.updates["lora_unet_single_blocks_0_linear1"]
    assert single.down.shape[1] == 64 and single.up.shape[0] == 64 * 7


@pytest.mark.smoke
@pytest.mark.parametrize("sd_scripts_at", ["v0.9.1", "v0.10.1", "v0.11.1"], indirect=True)
def test_sd_scripts_own_trainer_prunes_quantizes_and_saves_the_same_way(
    sd_scripts_at: Path, torchvision_repair: Path, model: Path, pictures: Path, tmp_path: Path
) -> None:
    """The network module alone: components go and weights are quantized while it trains, and it finds the optimizer by itself."""
    learning = ["iterative_pruning=true", "max_iterations=1", "min_rank=0", "qat=true", "qat_start=0.5"]
    flags = [*config(model, pictures, tmp_path, max_train_steps=4), "--network_args", "bits=8", "rank_ratio=0.5", *learning]
    printed = run_stock("train_network.py", sd_scripts_at, torchvision_repair, model, flags)
    assert "components kept" in printed and "compressed LoRA" in printed
    file = load_lora(tmp_path / "lora.safetensors")
    metadata = file.metadata
    assert file.packed and metadata["ss_compress_bits"] == "8" and json.loads(metadata["ss_network_args"])["rank_ratio"] == "0.5"
    kept, components = map(int, metadata["ss_compress_components"].split("/"))
    assert sum(update.rank for update in file.updates.values()) == kept == components // 2
    assert 0.0 < float(metadata["ss_compress_relative_error"]) < 1.0 and metadata["ss_compress_trained_steps"] == "4"


def test_a_training_that_prunes_and_quantizes_is_interrupted_and_goes_on(
    sd_scripts: Path, model: Path, pictures: Path, tmp_path: Path
) -> None:
    """Epochs become steps after the network was made; the state holds what the session must remember."""
    settings = ["--pruning", "rank_ratio=0.5", "min_rank=0", "iterative_pruning=true", "max_iterations=2"]
    settings += ["--quantization", "bits=4", "qat=true", "qat_refresh=1"]
    flags = [*config(model, pictures, tmp_path, max_train_epochs=4, save_precision="fp16"), *settings]
    train(flags, "--save_state", "--save_every_n_epochs=3", "--save_model_as=safetensors")
    state = load_file(tmp_path / "lora-000003-state" / "model.safetensors")
    masks = state["compress_training.kept"]
    steps = int(state["compress_training.step"])
    assert masks.sum() == len(masks) // 2 and bool(state["compress_training.quantizing"])
    whole = load_lora(tmp_path / "lora.safetensors")
    assert json.loads(whole.metadata["ss_compress_trained_steps"]) == steps // 3 * 4
    assert 0.0 < float(whole.metadata["ss_compress_relative_error"]) < 1.0

    (tmp_path / "again").mkdir()
    resume = f"--resume={tmp_path / 'lora-000003-state'}"
    again = config(model, pictures, tmp_path / "again", max_train_epochs=4, save_precision="fp16")
    printed = train([*again, *settings], resume, "--initial_epoch=4", "--skip_until_initial_step")
    assert "components kept" not in printed  # ranks were settled
    resumed = load_lora(tmp_path / "again" / "lora.safetensors")
    assert resumed.metadata["ss_compress_trained_steps"] == whole.metadata["ss_compress_trained_steps"]
    assert {n: u.rank for n, u in resumed.updates.items()} == {n: u.rank for n, u in whole.updates.items()}


def test_with_compression_off_training_is_the_hosts_to_the_last_bit(
    sd_scripts: Path, model: Path, pictures: Path, tmp_path: Path
) -> None:
    files = []
    for module in ("networks.lora", "networks.lora_compress"):
        folder = tmp_path / module
        folder.mkdir()
        train(config(model, pictures, folder, network_module=module, network_dropout=0.1))
        files.append(load_file(folder / "lora.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert any(tensor.abs().max() > 0 for key, tensor in files[0].items() if "lora_up" in key)


def test_training_goes_on_from_a_packed_file(sd_scripts: Path, model: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    train(config(model, pictures, tmp_path / "first"), "--quantization", "bits=8", "--pruning", "rank_ratio=0.5")
    first = tmp_path / "first" / "lora.safetensors"
    ranks = {name: update.rank for name, update in load_lora(first).updates.items()}
    # learning rate 0: what is saved is what was loaded
    still = {"network_weights": str(first), "learning_rate": 1e-30, "max_train_steps": 1, "save_precision": "float"}
    for name, flags in {"dim": ["--dim_from_weights"], "pad": [], "base": [f"--base_weights={first}"]}.items():
        folder = tmp_path / name
        folder.mkdir()
        train(config(model, pictures, folder, **still), *flags)
        again = load_lora(folder / "lora.safetensors").updates
        for module, update in load_lora(first).updates.items():
            assert again[module].rank == (ranks[module] if name == "dim" else 8)
            assert torch.allclose(again[module].dense(), update.dense(), atol=1e-5)


def test_gen_img_draws_with_a_packed_file(sd_scripts: Path, torchvision_repair: Path, pictures: Path, tmp_path: Path) -> None:
    train(config(models.TINY_SD, pictures, tmp_path), "--quantization", "bits=8")
    cache, size = f"--tokenizer_cache_dir={models.TOKENIZER_CACHE}", ["--W=64", "--H=64", "--steps=4", "--seed=1"]
    ours = ["--network_module=networks.lora_compress", f"--network_weights={tmp_path / 'lora.safetensors'}"]
    drawn = []
    for name, lora in {"without": [], "with": ours, "merged": [*ours, "--network_merge"]}.items():
        flags = [f"--ckpt={models.TINY_SD}", cache, "--prompt=a red star", *size, f"--outdir={tmp_path / name}", *lora]
        run_stock("gen_img.py", sd_scripts, torchvision_repair, models.TINY_SD, flags)
        (picture,) = (tmp_path / name).glob("*.png")
        drawn.append(torch.tensor(list(Image.open(picture).convert("RGB").tobytes()), dtype=torch.float32))
    without, live, merged = drawn
    assert (live - without).abs().mean() > 1  # of 255
    assert (live - merged).abs().mean() < 1


def test_full_size_sd15(sd_scripts: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random weights, 860 M parameters of U-Net: trained at 64x64, saved in int4, reloaded in a fresh process, same outputs."""
    folder = tmp_path_factory.mktemp("full")
    model = models.write_random_sd(folder / "model", full=True)
    try:
        values = {"max_train_steps": 3, "train_batch_size": 1, "learning_rate": 1e-3, "save_precision": "fp16"}
        flags = ["--quantization", "bits=4", "--save_state_on_train_end", "--network_train_unet_only"]
        train([*config(model, pictures, folder, **values), *flags], OMP_NUM_THREADS="2")
        file, state = folder / "lora.safetensors", folder / "lora-state" / "model.safetensors"
        compare = str(Path(__file__).with_name("compare_outputs.py"))
        printed = run([sys.executable, compare, str(model), str(file), str(state)], OMP_NUM_THREADS="2")
    finally:
        models.remove(model)
    lost = json.loads(printed.splitlines()[-1])
    reported = float(load_lora(file).metadata["ss_compress_relative_error"])
    assert len(load_lora(file).updates) == 192
    assert 0.0 < reported < 0.2
    assert lost < 2 * reported
    assert file.stat().st_size < 0.3 * state.stat().st_size / 2  # the state is fp32: under 0.3 of fp16


ERRORS = [
    ({"pretrained_model_name_or_path": "/absent/model.safetensors"}, [], "pretrained_model_name_or_path=/absent/model.safetensors"),
    ({"output_dir": "/proc/lora"}, ["--quantization", "bits=4"], "output_dir=/proc/lora: cannot be written"),
    ({"save_model_as": "ckpt"}, ["--quantization", "bits=4"], "save_model_as=ckpt cannot hold a compressed LoRA"),
]


@pytest.mark.parametrize(("more", "flags", "message"), ERRORS, ids=["model", "folder", "type"])
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is where Linux lets nobody write")
def test_one_clear_error_before_anything_is_trained(
    sd_scripts: Path, model: Path, pictures: Path, tmp_path: Path, more: dict[str, str], flags: list[str], message: str
) -> None:
    printed = run([sys.executable, "train_network_ext.py", *config(model, pictures, tmp_path, **more), *flags], status=2)
    assert printed.splitlines()[-1].startswith("error: ") and message in printed.splitlines()[-1]
    assert not list(tmp_path.glob("*.safetensors")) and "running training" not in printed


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is what stands in for a full disk")
def test_a_full_disk_leaves_nothing_behind(sd_scripts: Path, model: Path, pictures: Path, tmp_path: Path) -> None:
    code = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, '')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = [*config(model, pictures, tmp_path), "--quantization", "bits=8"]
    printed = run([sys.executable, "-c", code, "train_network_ext.py", *flags], status=2)
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "lora.safetensors: cannot be written" in error
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))
