"""`train_network_ext.py --host diffusers` on tiny-sd, where sd-scripts is not to be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.compress_torchvision import declare_missing_operators
from lora_compress import load_lora
from lora_compress.evaluation.shapes import write_dataset

declare_missing_operators()
pytest.importorskip("peft")

from lora_compress.diffusers import training  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TINY_SD = ROOT / "assets" / "tiny-sd"


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """What accelerate remembers of a process: a test is one training, not several in one process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


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
    write_dataset(tmp_path / "whole", count=2, repeats=1)
    config["dataset"]["train_data_dir"] = str(tmp_path / "whole")  # type: ignore[index]
    with pytest.raises(training.LoraCompressError, match=r"has no model_index\.json"):
        training.train({**config, "model": {"pretrained_model_name_or_path": str(tmp_path)}})
    with pytest.raises(
        training.LoraCompressError, match=r"optimizer_type=Adamw: torch\.optim and bitsandbytes have no such optimizer"
    ):
        training.train({**config, "optimizer": {"optimizer_type": "Adamw"}})
    with pytest.raises(training.LoraCompressError, match="mixed_precision=fp16: must be one of no, bf16"):
        training.train({**config, "precision": {"mixed_precision": "fp16"}})


def _sdxl(folder: Path) -> Path:
    """A folder with a narrow pipeline of SDXL's kind, random weights."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = CLIPTextConfig(**sizes, num_attention_heads=2, projection_dim=16, max_position_embeddings=tokenizer.model_max_length)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    encoders = {"text_encoder": CLIPTextModel(text), "text_encoder_2": CLIPTextModelWithProjection(text)}
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
    StableDiffusionXLPipeline(unet=unet, vae=vae, scheduler=EulerDiscreteScheduler(), **encoders, **tokenizers).save_pretrained(
        folder
    )
    return folder


def test_sdxl_learns_and_opens_in_its_pipeline(tmp_path: Path) -> None:
    """Both text encoders and the U-Net; checkpoints on the way; the file goes where it came from."""
    from diffusers import StableDiffusionXLPipeline

    from lora_compress.diffusers import load_lora as attach

    model = _sdxl(tmp_path / "sdxl")
    write_dataset(tmp_path / "data", count=4, repeats=1)
    config = {**_config(tmp_path), "model": {"pretrained_model_name_or_path": str(model)}}
    more = {"gradient_checkpointing": True, "save_every_n_steps": 4, "mixed_precision": "bf16"}
    path = training.train({**config, "more": more, "quantization": {"bits": 8}})
    updates = load_lora(path).updates
    assert {name.split("_")[1] for name in updates} == {"unet", "te1", "te2"}
    assert load_lora(tmp_path / "last-step00000004.safetensors").updates.keys() == updates.keys()
    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    attach(pipe, path)
    layers = sum(len(part.peft_config) and 1 for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2))
    assert layers == 3


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", count=4, repeats=1)
    files = []
    for name in (False, True):
        config = {
            **_config(tmp_path),
            "more": {"gradient_checkpointing": name, "output_name": str(name), "save_precision": "float"},
        }
        files.append(load_lora(training.train(config)).updates)
    for name, update in files[0].items():
        assert torch.allclose(update.up, files[1][name].up, atol=1e-6) and torch.allclose(
            update.down, files[1][name].down, atol=1e-6
        )


def test_two_processes_are_one_with_the_doubled_batch(tmp_path: Path) -> None:
    """On the same noise: each process asks for its half of what one would draw."""
    write_dataset(tmp_path / "data", count=4, repeats=1)
    worker = Path(__file__).with_name("diffusers_training_worker.py")
    common = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | common | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command, batch in ((torchrun, 2), ([sys.executable], 4)):
        argv = [*command, str(worker), str(tmp_path), str(batch)]
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_lora(tmp_path / f"batch{batch}.safetensors").updates for batch in (4, 2))
    assert one.keys() == two.keys()
    for name, update in one.items():
        assert float(update.up.norm()) > 0
        assert torch.allclose(update.up_matrix @ update.down_matrix, two[name].up_matrix @ two[name].down_matrix, atol=1e-5)
