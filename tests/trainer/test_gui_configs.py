"""Whole configs as the kohya_ss GUI and lora-scripts write them, through our launcher: read as sd-scripts reads them."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import toml

from lora_compress import SettingsError, load_lora
from lora_compress.evaluation.shapes import write_dataset
from tests.trainer import gui_configs
from tests.trainer.test_config import CHECKPOINTS, OURS, ROOT, checkpoint

# The config, the model that it is for, keys that sd-scripts does not have, and what is converted.
CONFIGS: list[tuple[str, str, set[str], dict[str, Any]]] = [
    ("KOHYA_SD", "sd", {"epoch", "noise_offset_type", "stop_text_encoder_training"}, {"persistent_data_loader_workers": True}),
    ("KOHYA_SDXL", "sdxl", {"epoch", "noise_offset_type", "stop_text_encoder_training"}, {"persistent_data_loader_workers": True}),
    (
        "KOHYA_FLUX",
        "flux",
        {
            *("epoch", "noise_offset_type", "stop_text_encoder_training"),
            *("mem_eff_save", "single_blocks_to_swap", "double_blocks_to_swap"),
        },
        {"persistent_data_loader_workers": True},
    ),
    ("LORA_SCRIPTS_SHELL", "sd", {"lr_restart_cycles"}, {}),
    ("COLAB", "sd", set(), {}),
    (
        "LORA_SCRIPTS_PAGE",
        "sd",
        {
            *("enable_base_weight", "enable_block_weights", "enable_preview"),
            *("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
        },
        {
            **{"learning_rate": 1e-4, "unet_lr": 1e-4, "text_encoder_lr": [1e-5]},
            **dict.fromkeys(("vae", "network_weights", "log_tracker_name")),
        },
    ),
    (
        "LORA_SCRIPTS_FLUX",
        "flux",
        {"enable_base_weight", "enable_block_weights", "enable_preview", "train_t5xxl"},
        {
            **{"learning_rate": 1e-4, "unet_lr": 1e-4, "text_encoder_lr": [1e-5]},
            **dict.fromkeys(("vae", "network_weights", "log_tracker_name")),
        },
    ),
]


@pytest.fixture
def ext(sd_scripts: Path) -> ModuleType:
    return importlib.import_module("train_network_ext")


def launch(ext: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, argv: list[str]) -> argparse.Namespace:
    """What the launcher would train with; the model is told from the checkpoint."""
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    host = ext.choose_host(argv)
    assert host is ext.HOSTS[kind]
    return ext.parse_arguments(argv, host)


def as_sd_scripts(ext: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, argv: list[str]) -> dict[str, Any]:
    parser = importlib.import_module(ext.HOSTS[kind].script).setup_parser()
    monkeypatch.setattr(sys, "argv", ["train_network.py", *argv])
    return vars(importlib.import_module("library.train_util").read_config_from_file(parser.parse_args(argv), parser))


def written(tmp_path: Path, name: str, kind: str) -> Path:
    """The config file, with the path of a checkpoint that has the keys of the model, and nothing else."""
    config = getattr(gui_configs, name)
    model = checkpoint(tmp_path / "model.safetensors", CHECKPOINTS[kind])
    place = config.get("model", config.get("training_arguments", config))
    text = toml.dumps(config).replace(place["pretrained_model_name_or_path"], model)
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "kind", "unknown", "converted"), CONFIGS, ids=[row[0] for row in CONFIGS])
@pytest.mark.parametrize("ours", [False, True], ids=["as it is", "with our network"])
def test_a_whole_config_is_read_as_sd_scripts_reads_it(
    ext: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    kind: str,
    unknown: set[str],
    converted: dict[str, Any],
    ours: bool,
) -> None:
    argv = ["--config_file", str(written(tmp_path, name, kind))]
    if ours:  # as the README tells users of the GUI to do: additional parameters
        argv += ["--network_module", "networks.lora_compress", "--network_args", "bits=4", "rank_ratio=0.5"]
    args = {key: value for key, value in vars(launch(ext, monkeypatch, kind, argv)).items() if key not in OURS - {"model_type"}}
    expected = as_sd_scripts(ext, monkeypatch, kind, argv)
    for record in caplog.records:
        assert record.levelno <= logging.WARNING
    told = [record.getMessage() for record in caplog.records if record.name == "library.compress_host"]
    assert len(told) == bool(converted) + bool(unknown)
    for key in unknown:
        assert f"{key} is not an option of sd-scripts" in told[-1]
    assert "".join(told).count("is not an option") == len(unknown)
    for key, value in converted.items():
        assert f"{key} = " in told[0] and args[key] == value
        expected[key] = value
    assert args.pop("model_type") == kind
    expected.pop("model_type", None)
    assert args == expected


LYCORIS_ARGUMENTS = {  # of the kohya_ss GUI, by algorithm
    "locon": "bypass_mode=False dora_wd=True use_scalar=False rank_dropout_scale=False",
    "loha": "bypass_mode=False dora_wd=False use_scalar=False rank_dropout_scale=False",
    "lokr": "bypass_mode=False dora_wd=False factor=-1 use_cp=False use_scalar=False decompose_both=False rank_dropout_scale=False",
    "glora": "rank_dropout_scale=False",
    "dylora": "block_size=4",
    "ia3": "train_on_input=True",
    "diag-oft": "rank_dropout_scale=False constraint=0 rescaled=False",
}


@pytest.mark.parametrize("algorithm", LYCORIS_ARGUMENTS)
def test_the_arguments_that_the_gui_writes_for_lycoris_are_taken(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, algorithm: str
) -> None:
    pytest.importorskip("lycoris")
    common = (
        f"preset=full conv_dim=4 conv_alpha=1 use_tucker=False rank_dropout=0 module_dropout=0 algo={algorithm} train_norm=False"
    )
    arguments = [*common.split(), *LYCORIS_ARGUMENTS[algorithm].split()]
    config = {"network_module": "networks.lora_compress", "network_args": [*arguments, "base=lycoris.kohya", "bits=4"]}
    (tmp_path / "config.toml").write_text(toml.dumps(config), encoding="utf-8")
    argv = ["--config_file", str(tmp_path / "config.toml")]
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    assert ext.parse_arguments(argv, ext.HOSTS["sd"]).network_args == config["network_args"]


def test_our_settings_at_the_wrong_place_are_told(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.toml"
    outside = ["bits = 4", "conv_dim = 8", "[[datasets]]", "batch_size = 1"]
    inside = ["[network]", "[network.more]", "network_dim = 4", "[also]", '"network-dim" = 8']
    path.write_text("\n".join([*outside, *inside]), encoding="utf-8")
    argv = ["--config_file", str(path)]
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    ext.parse_arguments(argv, ext.HOSTS["sd"])
    (told,) = [record.getMessage() for record in caplog.records if record.name == "library.compress_host"]
    assert "put it into [pruning] or [quantization]" in told
    assert 'network_args = ["conv_dim=8"]' in told
    assert "which dataset_config names" in told
    assert "move its keys one level up" in told
    assert "did you mean network_dim?" in told


@pytest.mark.parametrize("beginning", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("extension", [True, False], ids=["toml", "no extension"])
def test_how_a_file_is_stored_does_not_matter(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, beginning: bytes, end: str, extension: bool
) -> None:
    lines = ["output_name = '星'  # 星 = star", "[network_arguments]", "network_dim = 8", "# the end"]
    (tmp_path / "config.toml").write_bytes(beginning + end.join(lines).encode())
    argv = ["--config_file", str(tmp_path / ("config.toml" if extension else "config"))]
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    args = ext.parse_arguments(argv, ext.HOSTS["sd"])
    assert (args.output_name, args.network_dim, args.config_file) == ("星", 8, str(tmp_path / "config"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("vae = 'ä'".encode("latin-1"), "UTF-8"),
        (rb'vae = "C:\models\vae.pt"', "single quotes"),
        (b"text_encoder_lr = [0, 1e-5]", "decimal point"),
        (b"cache_latents = True", "small letters"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_the_remedy(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, part: str
) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(SettingsError, match=part):
        ext.choose_host(["--config_file", str(tmp_path / "config.toml")])


def test_a_data_set_config_with_a_byte_order_mark_is_refused(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    argv = ["--dataset_config", str(tmp_path / "data.toml")]
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    (tmp_path / "data.toml").write_bytes(b"[general]\nresolution = 64\n")
    assert ext.parse_arguments(argv, ext.HOSTS["sd"])
    (tmp_path / "data.toml").write_bytes(b"\xef\xbb\xbf[general]\nresolution = 64\n")
    with pytest.raises(SettingsError, match=r"data\.toml.*byte order mark"):
        ext.parse_arguments(argv, ext.HOSTS["sd"])


def test_a_preset_of_the_gui_is_no_config_file(ext: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "preset.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"is JSON.*config_lora-<time>\.toml"):
        ext.choose_host(["--config_file", str(tmp_path / "preset.json")])


def test_the_command_line_wins_over_values_that_are_converted(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text('clip_skip = "1"\nvae = false\nseed = 1.0\nlog_with = ""\n', encoding="utf-8")
    argv = ["--config_file", str(path), "--clip_skip", "2", "--vae", "./vae.pt"]
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    args = ext.parse_arguments(argv, ext.HOSTS["sd"])
    assert (args.clip_skip, args.vae, args.seed, args.log_with) == (2, "./vae.pt", 1, None)
    assert isinstance(args.seed, int)


def test_a_config_of_the_gui_trains(sd_scripts: Path, torchvision_repair: Path, tmp_path: Path) -> None:
    """A config of the kohya_ss GUI with values as people quote them, without what needs a GPU or the network."""
    write_dataset(tmp_path / "data", count=2, repeats=1)
    absent = {"log_tracker_config", "network_weights", "resume", "resume_from_huggingface", "reg_data_dir", "sample_prompts", "vae"}
    absent |= {"save_state_to_huggingface", "weighted_captions", "color_aug", "random_crop", "train_inpainting", "v2", "full_fp16"}
    absent |= {"v_parameterization", "scale_v_pred_loss_like_noise_pred", "mem_eff_attn", "xformers", "dim_from_weights"}
    absent |= {"network_train_text_encoder_only", "max_train_epochs", "stop_text_encoder_training", "masked_loss", "save_state"}
    absent |= {"save_state_on_train_end", "flip_aug"}
    absent |= {
        name for name in gui_configs.KOHYA_SD if name.startswith(("huggingface", "wandb", "sample_", "save_last", "save_every"))
    }
    values = {name: value for name, value in gui_configs.KOHYA_SD.items() if name not in absent}
    values |= {
        "pretrained_model_name_or_path": "assets/tiny-sd",
        "tokenizer_cache_dir": "assets/tiny-sd/tokenizer_cache",
        "train_data_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "logging_dir": "",
        "log_with": "",
        "mixed_precision": "NO",
        "optimizer_type": "AdamW",
        "resolution": 64,
        "min_bucket_reso": 64.0,
        "max_bucket_reso": 64,
        "max_train_steps": "2",
        "clip_skip": "1",
        "cache_latents": 1,
        "persistent_data_loader_workers": 0,
        "cache_latents_to_disk": 0,
        "network_dim": 4.0,
        "learning_rate": "1e-3",
        "optimizer_args": "weight_decay=0.01 betas=0.9,0.99",
        "lr_scheduler_args": "",
        "lr_scheduler_type": "",
        "sample_prompts": False,
        "resume": False,
        "vae": False,
        "save_every_n_steps": 0,
        "network_module": "networks.lora_compress",
        "network_args": "bits=4 rank_ratio=0.5 conv_dim=4",
    }
    (tmp_path / "config.toml").write_text(toml.dumps(values), encoding="utf-8")
    environment = os.environ | {"SD_SCRIPTS_DIR": str(sd_scripts), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(torchvision_repair)}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process=1"]
    command = [*launcher, "train_network_ext.py", "--config_file", str(tmp_path / "config")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    packed = load_lora(tmp_path / "out" / "star.safetensors")
    assert packed.metadata["ss_compress_bits"] == "4" and packed.metadata["ss_steps"] == "2"
