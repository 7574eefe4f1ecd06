"""`train_network_ext.py --host diffusers` on tiny-sd, where sd-scripts is not to be had."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from consumers import trainable
from consumers.conftest import TORCHAO_ELSEWHERE

from library.compress_torchvision import declare_missing_operators
from lora_compress import SettingsError, load_lora
from lora_compress.evaluation.shapes import write_dataset
from lora_compress.evaluation.validation import read_history

declare_missing_operators()
peft = pytest.importorskip("peft")

from lora_compress.trainer import training  # noqa: E402
from lora_compress.trainer.options import read_plan  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TINY_SD = ROOT / "assets" / "tiny-sd"


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """What accelerate remembers of a process: a test is one training, not several in one process."""
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
    command = [sys.executable, "train_network_ext.py", "--host", "diffusers", f"--config_file={config.with_suffix('')}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--network_module", "networks.lora_compress", "--network_args", "bits=4", "save_format=packed"]
    environment = os.environ | {"SD_SCRIPTS_DIR": str(tmp_path / "nowhere")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("leaves out: clip_skip, foo") == 1
    assert load_lora(tmp_path / "last.safetensors").metadata["ss_compress_bits"] == "4"


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
    for name, wrong in (("max_train_steps", "many"), ("resolution", "wide"), ("unet_lr", "low")):
        with pytest.raises(training.LoraCompressError, match=f"{name}={wrong}: must be"):
            training.train({**config, "command line": {name: wrong}})
    with pytest.raises(training.LoraCompressError, match="mixed_precision=fp16: must be one of no, bf16"):
        training.train({**config, "precision": {"mixed_precision": "fp16"}})


def test_sdxl_learns_and_opens_in_its_pipeline(tmp_path: Path) -> None:
    """Both text encoders and the U-Net; checkpoints on the way; the file goes where it came from."""
    from diffusers import StableDiffusionXLPipeline

    from lora_compress.diffusers import load_lora as attach

    model = trainable.sdxl(tmp_path / "sdxl")
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


FAMILIES: dict[str, tuple[Callable[[Path], Path], set[str]]] = {
    "SD3": (trainable.sd3, {"transformer", "te1", "te2"}),
    "FLUX": (trainable.flux, {"transformer", "te1"}),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_flow_models_learn_and_open_in_their_pipelines(family: str, tmp_path: Path) -> None:
    """Through load_lora packed, through diffusers' own loader in PEFT's layout: the same picture, which is not that of the base."""
    from diffusers import DiffusionPipeline

    from lora_compress.diffusers import load_lora as attach

    make, parts = FAMILIES[family]
    model = make(tmp_path / "model")
    write_dataset(tmp_path / "data", count=4, repeats=1)
    more = {"save_peft": True, "gradient_checkpointing": True, "unet_lr": 1e-2, "text_encoder_lr": 1e-2}
    config = {**_config(tmp_path), "model": {"pretrained_model_name_or_path": str(model)}, "more": more}
    path = training.train({**config, "quantization": {"bits": 8, "save_format": "packed"}})
    assert {name.split("_")[1] for name in load_lora(path).updates} == parts

    def drawn(prepare: Callable[[Any], object]) -> torch.Tensor:
        pipe = DiffusionPipeline.from_pretrained(model)
        prepare(pipe)
        noise = torch.Generator().manual_seed(0)
        asked = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "pt", "generator": noise}
        found: torch.Tensor = pipe("a red star", **asked).images
        return found

    base = drawn(lambda pipe: None)
    packed = drawn(lambda pipe: attach(pipe, path))
    peft = drawn(lambda pipe: pipe.load_lora_weights(path.parent, weight_name=path.with_suffix(".peft.safetensors").name))
    assert (packed - base).abs().max() > 1e-2
    assert (packed - peft).abs().max() < 1e-2 * (packed - base).abs().max() + 2e-3


def test_a_resumed_training_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    """Masks, scales, optimizer, order, noise; what was sampled and measured on the way changes nothing."""
    write_dataset(tmp_path / "data", count=4, repeats=1)
    held = write_dataset(tmp_path / "held", count=6, repeats=1, seed=5).parent
    (tmp_path / "prompts.txt").write_text("a red star --s 1 --d 7 --n a circle\na blue disc --s 1\n", encoding="utf-8")
    pruning = {"iterative_pruning": True, "rank_ratio": 0.5, "rank_return": True, "pruning_end": 0.5}
    qat = {"bits": 4, "qat": True, "qat_start": 0.5, "save_format": "packed"}
    saving = {"save_every_n_steps": 3, "save_state": True}
    watched = {"sample_prompts": str(tmp_path / "prompts.txt"), "sample_every_n_steps": 3, "sample_sampler": "ddim"}
    evaluation = {"extractor": "probe", "reference": str(held), "count": 4, "size": 64, "steps": 1}
    runs: dict[str, dict[str, object]] = {
        "whole": {"own": {"output_name": "whole", **saving}},
        "watched": {"own": {"output_name": "watched", **saving, **watched, "validate_every_n_steps": 3}, "evaluation": evaluation},
        "resumed": {"own": {"output_name": "resumed", "resume": str(tmp_path / "watched-step00000003-state")}},
    }
    files = {}
    for name, more in runs.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        files[name] = training.train({**_config(tmp_path), **more, "pruning": pruning, "quantization": qat}).read_bytes()
    assert files["whole"] == files["watched"] == files["resumed"]
    assert len(list((tmp_path / "sample").glob("watched_00000[36]_0[01].png"))) == 4
    entries = read_history(tmp_path / "watched.evaluations.jsonl")
    assert [entry["step"] for entry in entries] == [3, 6] and all(entry["probe_fd"] > 0 for entry in entries)
    assert "probe_fd" in (tmp_path / "watched.evaluations.html").read_text(encoding="utf-8")
    state = load_lora(tmp_path / "watched-state" / "model.safetensors").updates
    assert {update.rank for update in state.values()} == {4}
    with pytest.raises(training.LoraCompressError, match="other layers or ranks"):
        AcceleratorState._reset_state(reset_partial_state=True)
        training.train({**_config(tmp_path), **runs["resumed"], "rank": {"network_dim": 2}})
    with pytest.raises(training.LoraCompressError, match="holds no state of --host diffusers"):
        AcceleratorState._reset_state(reset_partial_state=True)
        training.train({**_config(tmp_path), "own": {"resume": str(tmp_path)}})
    state = tmp_path / "watched-step00000003-state"
    with pytest.raises(training.LoraCompressError, match="differ: the state is of another network or of other pruning"):
        AcceleratorState._reset_state(reset_partial_state=True)
        training.train({**_config(tmp_path), **runs["resumed"], "pruning": pruning})
    whole = (state / "custom_checkpoint_0.pkl").read_bytes()
    (state / "custom_checkpoint_0.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(training.LoraCompressError, match=r"resume=.*: the state is damaged, or was not saved by this version"):
        AcceleratorState._reset_state(reset_partial_state=True)
        training.train({**_config(tmp_path), **runs["resumed"], "pruning": pruning, "quantization": qat})


def test_a_training_that_diverges_ends_with_one_error_and_keeps_its_last_file(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", count=4, repeats=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    wild = {"unet_lr": 1e30, "text_encoder_lr": 1e30, "max_grad_norm": 0, "save_every_n_steps": 1, "save_state": True}
    with pytest.raises(training.LoraCompressError, match=r"the training diverged|do not fit"):
        training.train({**_config(tmp_path), "own": {"output_name": "wild", **wild}})
    for path in tmp_path.glob("wild*.safetensors"):
        assert all(update.down.isfinite().all() and update.up.isfinite().all() for update in load_lora(path).updates.values())
    assert not (tmp_path / "wild.safetensors").exists()


def test_the_controller_leads_the_compression(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", count=4, repeats=1)
    held = write_dataset(tmp_path / "held", count=6, repeats=1, seed=5).parent
    config = {
        **_config(tmp_path),
        "own": {"validate_every_n_steps": 1},
        "evaluation": {"extractor": "probe", "reference": str(held), "count": 4, "size": 64, "steps": 1},
        "pruning": {"rank_ratio": 0.8, "min_rank": 0, "pruning_start": 0.0, "pruning_end": 0.2, "max_iterations": 1},
        "quantization": {"bits": 8, "qat_start": 0.2},
        "adaptive": {"max_fid_gap": 1e6, "patience": 1},
    }
    path = training.train(config)
    entries = read_history(tmp_path / "last.evaluations.jsonl")
    changes = [entry for entry in entries if entry["action"] == "compress"]
    assert changes and all("probe_fd_full" in entry for entry in changes)
    assert "adaptive_changes" in str(load_lora(path).metadata)
    with pytest.raises(training.LoraCompressError, match=r"\[adaptive\] follows the evaluations"):
        training.train({**_config(tmp_path), "adaptive": {}})


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_quantized_base_takes_less_and_the_lora_learns_on_it(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    write_dataset(tmp_path / "data", count=4, repeats=1)
    path = training.train({**_config(tmp_path), "own": {"base_quantize": base, "load_8bit_text_encoder": True}})
    told = [line for line in caplog.messages if "of the bytes are gone" in line]
    assert len(told) == 2 and int(told[0].split("%")[0].split()[-1]) >= 40
    assert all(float(update.up.norm()) > 0 for update in load_lora(path).updates.values())


@pytest.mark.parametrize(("base", "package"), [("quanto", "optimum.quanto"), ("torchao", "torchao")])
def test_a_base_that_another_library_stores_is_learned_on(
    base: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package == "torchao" and importlib.util.find_spec(package) is None:
        pytest.skip(TORCHAO_ELSEWHERE)
    pytest.importorskip(package)
    loaded, load = [], training.load_denoiser
    monkeypatch.setattr(training, "load_denoiser", lambda *given: loaded.append(load(*given)) or loaded[0])
    write_dataset(tmp_path / "data", count=4, repeats=1)
    own = {"base_quantize": base}
    config = {**_config(tmp_path), "own": own, "quantization": {"bits": 4, "qat": True}}
    if base == "torchao" and peft.__version__.startswith("0.17."):
        with pytest.raises(SettingsError, match=r"PEFT 0\.17.*upgrade PEFT"):
            training.train(config)
        return
    path = training.train(config)
    assert all(float(update.up.norm()) > 0 for update in load_lora(path).updates.values())
    layers = [layer.base_layer for layer in loaded[0].models["unet"].modules() if hasattr(layer, "base_layer")]
    stored = [layer.weight for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert len(stored) > 100 and all(type(weight) not in (torch.Tensor, torch.nn.Parameter) for weight in stored)


AS_PEOPLE_WRITE_IT = {  # a value, and what the training goes by
    "train_batch_size": ("2", 2),
    "max_train_steps": (20.0, 20),
    "network_dim": ("8", 8),
    "network_alpha": ("4", 4.0),
    "unet_lr": ("1e-4", 1e-4),
    "text_encoder_lr": ([5e-5, 5e-5], 5e-5),
    "lr_warmup_steps": ("10%", 2),
    "gradient_checkpointing": ("false", False),
    "load_8bit_text_encoder": (0, False),
    "save_state": (1, True),
    "save_precision": ("", "fp16"),
    "mixed_precision": ("BF16", "bf16"),
    "save_every_n_steps": (0, None),
    "sample_prompts": (False, None),
    "resume": ("", None),
    "base_quantize": ("none", None),
    "resolution": ([64, 128], (64, 128)),
    "seed": ("7", 7),
    "output_name": ("star", "star"),
}


def test_values_are_read_as_those_of_sd_scripts_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {**_config(tmp_path), "kohya": {name: value for name, (value, _) in AS_PEOPLE_WRITE_IT.items()}}
    config["network"] = {"network_args": "bits=4 rank_ratio=0.5 conv_dim=4", "dynamo_backend": "no", "xformers": True}
    plan = read_plan(config).in_steps(per_epoch=3)
    for name, (value, meant) in AS_PEOPLE_WRITE_IT.items():
        assert plan.options[name] == meant and type(plan.options[name]) is type(meant), name
        if name not in ("resume", "save_precision", "text_encoder_lr") and not isinstance(value, type(meant)):
            assert f"{name} = " in caplog.text
    assert plan.compression.quantization.bits == 4
    conversions, left_out = (record.getMessage() for record in caplog.records)
    assert "is read as" in conversions and "leaves out: dynamo_backend, xformers, network_args conv_dim" in left_out


def test_epochs_and_shares_are_steps(tmp_path: Path) -> None:
    config = {**_config(tmp_path), "more": {"max_train_epochs": 5, "lr_warmup_steps": 0.1}}
    plan = read_plan(config)
    assert (plan.in_steps(4).options["max_train_steps"], plan.in_steps(4).options["lr_warmup_steps"]) == (20, 2)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"gradient_checkpointing": "maybe"}, "gradient_checkpointing=maybe: must be true or false"),
        ({"max_train_steps": 1.5}, "max_train_steps=1.5: must be a whole number"),
        ({"network_args": {"bits": 4}}, r'write network_args = \["bits=4"\]'),
        ({"quantization": {"enabled": "maybe"}}, r"\[quantization\] enabled=maybe"),
    ],
)
def test_values_without_a_meaning_are_refused(tmp_path: Path, more: dict[str, object], part: str) -> None:
    with pytest.raises(SettingsError, match=part):
        read_plan({**_config(tmp_path), **more})


def test_network_args_are_settings_too(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", count=4, repeats=1)
    path = training.train({**_config(tmp_path), "own": {"network_args": ["bits=4", "save_format=packed", "conv_dim=4"]}})
    assert load_lora(path).metadata["ss_compress_bits"] == "4"
