"""Configs: kohya's and lora-scripts' are read as sd-scripts reads them, ours apart; what is wrong is said early and by name."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import toml
import torch
from safetensors.torch import load_file, save_file

from lora_compress import EvaluationSettings, LoraCompressError, SettingsError, setting_names
from tests import architectures

ROOT = Path(__file__).resolve().parents[2]
OURS = {"pruning", "quantization", "evaluation", "adaptive", "quantization_device"}
OURS |= {"model_type", "base_quantize", "load_8bit_text_encoder"}
LORA_SCRIPTS = {  # the keys of lora-scripts' config/lora.toml and default.toml, section by section
    "model_arguments": {"v2": False, "v_parameterization": False, "pretrained_model_name_or_path": "./sd-models/model.ckpt"},
    "dataset_arguments": {"train_data_dir": "./train/aki", "reg_data_dir": "", "resolution": "512,512", "prior_loss_weight": 1},
    "additional_network_arguments": {
        "network_dim": 32,
        "network_alpha": 16,
        "network_train_unet_only": False,
        "network_train_text_encoder_only": False,
        "network_module": "networks.lora",
        "network_args": [],
    },
    "optimizer_arguments": {
        "unet_lr": 1e-4,
        "text_encoder_lr": 1e-5,
        "optimizer_type": "AdamW8bit",
        "lr_scheduler": "cosine_with_restarts",
        "lr_warmup_steps": 0,
        "lr_restart_cycles": 1,
    },
    "training_arguments": {
        "train_batch_size": 1,
        "noise_offset": 0.0,
        "keep_tokens": 0,
        "min_bucket_reso": 256,
        "max_bucket_reso": 1024,
        "caption_extension": ".txt",
        "max_token_length": 225,
        "seed": 1337,
        "xformers": True,
        "lowram": False,
        "max_train_epochs": 10,
        "clip_skip": 2,
        "mixed_precision": "fp16",
    },
    "sample_prompt_arguments": {"sample_sampler": "euler_a", "sample_every_n_epochs": 5},
    "saving_arguments": {
        "output_name": "output_name",
        "save_every_n_epochs": 1,
        "save_n_epoch_ratio": 0,
        "save_last_n_epochs": 499,
        "save_state": False,
        "save_model_as": "safetensors",
        "output_dir": "./output",
        "logging_dir": "./logs",
        "log_prefix": "",
        "save_precision": "fp16",
    },
    "others": {"cache_latents": True, "shuffle_caption": True, "enable_bucket": True},
}


@pytest.fixture
def ext(sd_scripts: Path) -> ModuleType:
    return importlib.import_module("train_network_ext")


def parse(ext: ModuleType, monkeypatch: pytest.MonkeyPatch, *argv: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    return ext.parse_arguments(list(argv), ext.HOSTS["sd"])


def parse_as_sd_scripts(monkeypatch: pytest.MonkeyPatch, *argv: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["train_network.py", *argv])
    train_network, train_util = importlib.import_module("train_network"), importlib.import_module("library.train_util")
    parser = train_network.setup_parser()
    return train_util.read_config_from_file(parser.parse_args(argv), parser)


def write(path: Path, config: dict) -> str:
    path.write_text(toml.dumps(config), encoding="utf-8")
    return str(path)


def without_ours(args: argparse.Namespace) -> dict[str, object]:
    return {name: value for name, value in vars(args).items() if name not in OURS}


@pytest.mark.parametrize("flat", [False, True], ids=["sections", "flat"])
def test_a_lora_scripts_config_is_read_as_sd_scripts_reads_it(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, flat: bool
) -> None:
    config = {key: value for section in LORA_SCRIPTS.values() for key, value in section.items()} if flat else LORA_SCRIPTS
    argv = ["--config_file", write(tmp_path / "lora.toml", config), "--optimizer_type=AdamW", "--sdpa"]
    expected = parse_as_sd_scripts(monkeypatch, *argv)
    with caplog.at_level(logging.WARNING):
        assert without_ours(parse(ext, monkeypatch, *argv)) == vars(expected)
    assert "lr_restart_cycles is not an option of sd-scripts" in caplog.text
    assert without_ours(parse(ext, monkeypatch, "--config", *argv[1:])) == vars(expected)


def test_our_example_differs_from_sd_scripts_in_network_args_alone(ext: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--config_file", str(ROOT / "config" / "lora.toml")]
    args = without_ours(parse(ext, monkeypatch, *argv))
    expected = vars(parse_as_sd_scripts(monkeypatch, *argv))
    added = {name for name in expected if name not in args}
    assert added <= {"enabled", *setting_names()}  # sd-scripts flattens every section onto its arguments
    config = toml.load(ROOT / "config" / "lora.toml")
    wanted = {**config["pruning"], **config["quantization"]}
    wanted.pop("enabled")
    assert args.pop("network_args") == [f"{name}={value}" for name, value in wanted.items()]
    assert args == {name: value for name, value in expected.items() if name not in added | {"network_args"}}


@pytest.mark.parametrize("name", ["lora.toml", "demo.toml"])
def test_our_configs_have_no_key_that_means_nothing(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with caplog.at_level(logging.WARNING):
        parse(ext, monkeypatch, "--config_file", str(ROOT / "config" / name))
    assert "is not an option" not in caplog.text


def test_precedence_is_command_line_then_network_args_then_sections(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {
        "network": {"network_module": "networks.lora_compress", "network_args": ["conv_dim=4", "bits=8", "min_rank=2"]},
        "pruning": {"enabled": True, "rank_ratio": 0.5, "min_rank": 1, "norm_threshold": 0.1},
        "quantization": {"enabled": True, "bits": 4, "group_size": 32},
    }
    path = write(tmp_path / "a.toml", config)
    args = parse(ext, monkeypatch, "--config", path, "--pruning", "rank_ratio=0.7", "--quantization_device", "cpu")
    values = dict(pair.split("=") for pair in args.network_args)
    assert values == {
        "conv_dim": "4",
        "bits": "8",
        "group_size": "32",
        "min_rank": "2",
        "rank_ratio": "0.7",
        "norm_threshold": "0.1",
        "quantization_device": "cpu",
    }
    args = parse(ext, monkeypatch, "--config", path, "--quantization", "enabled=false")
    assert sorted(args.network_args) == sorted(["conv_dim=4", "rank_ratio=0.5", "min_rank=2", "norm_threshold=0.1"])
    config["pruning"]["enabled"] = False
    args = parse(ext, monkeypatch, "--config", write(tmp_path / "b.toml", config), "--quantization", "bits=4", "strategy=nf4")
    assert dict(pair.split("=") for pair in args.network_args)["strategy"] == "nf4"
    assert "rank_ratio=0.5" not in args.network_args


WRONG = [
    ({"training": {"max_train_epochs": "ten"}}, [], ["[training] max_train_epochs = 'ten'", "whole number"]),
    (
        {"training": {"cache_latents": "maybe"}, "model": {"seed": 1.5}},
        [],
        ["[training] cache_latents = 'maybe'", "true or false", "[model] seed = 1.5", "whole number"],
    ),
    ({"vae": True}, [], ["vae = True", "text"]),
    ({"noise_offset": True}, [], ["noise_offset = True", "a number"]),
    ({"loss_type": "l3"}, [], ["loss_type = 'l3'", "one of l1, l2, huber"]),
    ({"base_quantize": ""}, [], ["base_quantize = ''", "not set"]),
    ({"load_8bit_text_encoder": 1}, [], ["load_8bit_text_encoder = 1", "true"]),
    ({"network_args": {"conv_dim": 4}}, [], ["network_args = {'conv_dim': 4}", 'network_args = ["conv_dim=4"]']),
    ({"network": {"network_args": {"conv_dim": 4}}}, [], ["[network] network_args", 'network_args = ["conv_dim=4"]']),
    ({"network_args": [{"conv_dim": 4}]}, [], ['network_args = ["conv_dim=4"]']),
    ({"optimizer_args": {"weight_decay": 0.1}}, [], ['optimizer_args = ["weight_decay=0.1"]']),
    ({"optimizer_args": ["weight_decay"]}, [], ["optimizer_args", "'weight_decay' must be written key=value"]),
    ({"network_args": ["conv_dim=undefined"]}, [], ["conv_dim=undefined", "left empty", "remove conv_dim"]),
    (
        {"network_module": "networks.lora", "network_args": ["conv_dim=undefined"]},
        [],
        ["conv_dim=undefined", "remove conv_dim"],
    ),
    ({"network_args": ["conv_alpha="]}, [], ["conv_alpha=", "left empty"]),
    ({"network_args": ["unit=4"]}, [], ["unit=4", "unknown setting of networks.lora", "networks.dylora has it"]),
    ({}, ["--network_args", "algo=locon"], ["algo=locon", "lycoris.kohya", "base=lycoris.kohya"]),
    ({}, ["--network_args", "train_double_block_indices=all"], ["train_double_block_indices", "networks.lora_flux"]),
    ({"network_args": ["enable_all_linear=True"]}, [], ["networks.oft and networks.oft_flux have it"]),
    ({"quantization": {"bit": 4}}, [], ["[quantization]", "bit", "did you mean bits"]),
    (
        {"pruning": {"bits": 4}},
        [],
        ["[pruning]", "bits: unknown", "min_rank, new_conv_rank"],
    ),
    ({"pruning": {"enabled": "maybe"}}, [], ["enabled = 'maybe'", "true or false"]),
    ({"pruning": {"iterative_pruning": True}}, [], ["iterative_pruning"]),
    ({"quantization": {"bits": 7}}, [], ["bits=7", "dynamic: 2, 3, 4"]),
    ({"quantization": {"bits": "four"}}, [], ["bits='four'", "a number"]),
    ({"network_args": ["conv_din=4"]}, [], ["conv_din", "did you mean conv_dim"]),
    ({"network_args": ["bits"]}, [], ["'bits'", "key=value"]),
    (
        {"network_module": "networks.lora", "quantization": {"bits": 4}},
        [],
        ["network_module is networks.lora", "networks.lora_compress"],
    ),
    ({}, ["--quantization", "bits=4", "strategy=nf5"], ["strategy=nf5", "dynamic, static, nf4"]),
    ({}, ["--pruning", "rank_ratio=1.5"], ["rank_ratio=1.5", "(0, 1]"]),
]


@pytest.mark.parametrize(
    ("config", "flags", "parts"), WRONG, ids=lambda value: json.dumps(value) if isinstance(value, dict) else None
)
def test_what_is_wrong_is_named(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict, flags: list[str], parts: list[str]
) -> None:
    path = write(tmp_path / "wrong.toml", {"network_module": "networks.lora_compress", **config})
    with pytest.raises(SettingsError) as caught:
        parse(ext, monkeypatch, "--config_file", path, *flags)
    for part in parts:
        assert part in str(caught.value)


def test_a_config_that_is_missing_or_no_toml_is_one_line_and_exit_status_2(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\nv2 = false", encoding="utf-8")
    for path, part in ((tmp_path / "absent.toml", "no such file"), (broken, "not valid TOML")):
        monkeypatch.setattr(sys, "argv", ["train_network_ext.py", "--config_file", str(path)])
        assert ext.main() == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and part in error and str(path) in error and "\n" not in error


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ([], "network_module: not set"),
        (["--network_module=networks.tlora_anima"], "network_module=networks.tlora_anima: neither"),
        (["--network_module=nobody.has.it"], "network_module=nobody.has.it: neither"),
    ],
)
def test_a_training_without_a_network_is_one_line_and_exit_status_2(
    ext: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    part: str,
) -> None:
    model = checkpoint(tmp_path / "model.safetensors", CHECKPOINTS["sd"])
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", "--pretrained_model_name_or_path", model, *given])
    assert ext.main() == 2
    error = capsys.readouterr().err.strip()
    assert f"error: {part}" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("module", "given", "parts"),
    [
        (
            "networks.lora",
            ["conv_dim=4", "unit=4", "bits=4"],
            ["unit, which networks.dylora has", "bits, which networks.lora_compress"],
        ),
        ("networks.dylora", ["unit=4", "conv_dim=4"], []),
        ("lycoris.kohya", ["algo=locon", "rank_dropout_scale=False"], []),
        ("somebody.else", ["unit=4", "bits=4"], []),
    ],
)
def test_arguments_that_another_network_reads_are_told(
    ext: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    module: str,
    given: list[str],
    parts: list[str],
) -> None:
    argv = [f"--network_module={module}", "--network_args", *given]
    assert parse(ext, monkeypatch, *argv).network_args == given  # as sd-scripts, which hands them on
    assert ("does not read" in caplog.text) == bool(parts)
    for part in parts:
        assert part in caplog.text


def test_network_args_in_one_text_are_several(ext: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--network_module=networks.lora_compress", "--network_args", "conv_dim=4 conv_alpha=1", "bits=4"]
    assert parse(ext, monkeypatch, *argv).network_args == ["conv_dim=4", "conv_alpha=1", "bits=4"]


D = "model.diffusion_model."
CHECKPOINTS = {
    "sd": ["cond_stage_model.transformer.x", D + "out.0.weight"],
    "sd ": [D + "input_blocks.0.0.weight"],  # a U-Net alone
    "sdxl": ["conditioner.embedders.1.model.ln_final.weight", D + "input_blocks.0.0.weight"],
    "sd3": [D + "joint_blocks.0.x_block.attn.qkv.weight", "text_encoders.clip_l.x"],
    "flux": ["double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"],
    "flux ": [D + "double_blocks.0.img_attn.qkv.weight", D + "vector_in.in_layer.weight"],
    "flux  ": [
        "transformer_blocks.0.attn.add_k_proj.bias",
        "time_text_embed.text_embedder.linear_1.weight",
        "single_transformer_blocks.0.attn.to_k.bias",
    ],
    "chroma": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "distilled_guidance_layer.in_proj.weight"],
    "lumina": ["cap_embedder.0.weight", "noise_refiner.0.attention.qkv.weight"],
    "hunyuan_image": ["double_blocks.0.img_attn_qkv.weight", "byt5_in.fc1.weight"],
    "anima": ["net.blocks.0.self_attn.q_proj.weight", "net.llm_adapter.embed.weight"],
}
RELATIVES = {  # that sd-scripts does not train
    "FLUX.2": ["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"],
    "Z-Image": ["cap_embedder.0.weight", "noise_refiner.0.attention.qkv.weight", "cap_pad_token"],
    "HunyuanVideo": ["double_blocks.0.img_attn_qkv.weight", "vector_in.in_layer.weight"],
    "Cosmos": ["net.blocks.0.self_attn.q_proj.weight"],
    "Qwen-Image": ["transformer_blocks.0.attn.add_k_proj.bias", "transformer_blocks.0.img_mlp.net.0.proj.weight"],
}


def checkpoint(path: Path, keys: list[str]) -> str:
    tensors = {key: torch.zeros(1, 1) for key in keys} | {"img_in.proj.weight": torch.zeros(1, 1, 1, 1)}
    save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_model_type_is_told_from_keys_alone(ext: ModuleType, tmp_path: Path, kind: str) -> None:
    file = checkpoint(tmp_path / "model.safetensors", CHECKPOINTS[kind])
    assert ext.detect_model_type(file) == kind.strip()
    assert ext.choose_host(["--pretrained_model_name_or_path", file]) is ext.HOSTS[kind.strip()]
    torch.save({"state_dict": load_file(file)}, tmp_path / "model.ckpt")
    assert ext.detect_model_type(str(tmp_path / "model.ckpt")) == kind.strip()


@pytest.mark.parametrize("relative", RELATIVES)
def test_relatives_of_the_models_are_not_taken_for_them(ext: ModuleType, tmp_path: Path, relative: str) -> None:
    with pytest.raises(LoraCompressError, match="no model that sd-scripts trains"):
        ext.detect_model_type(checkpoint(tmp_path / "model.safetensors", RELATIVES[relative]))


@pytest.mark.parametrize("kind", ["sd3", "flux", "chroma", "lumina", "hunyuan_image", "anima"])
@pytest.mark.parametrize("prefix", ["", D])
def test_the_hosts_own_models_have_the_keys_that_tell_them(ext: ModuleType, tmp_path: Path, kind: str, prefix: str) -> None:
    """Of narrow instances of sd-scripts' real classes, so that the table of keys above cannot be made up."""
    keys = architectures.make(kind).model.state_dict()
    shapes = {prefix + key: torch.zeros([1] * tensor.ndim) for key, tensor in keys.items()}
    save_file(shapes, tmp_path / "model.safetensors")
    assert ext.detect_model_type(str(tmp_path / "model.safetensors")) == kind


def test_the_model_type_is_told_from_a_folder_of_diffusers(ext: ModuleType, tmp_path: Path) -> None:
    pipelines = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl", "FluxPipeline": "flux"}
    for pipeline in (*pipelines, "StableDiffusion3Pipeline", "Lumina2Pipeline"):
        folder = tmp_path / pipeline
        folder.mkdir()
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        if pipeline in pipelines:
            assert ext.detect_model_type(str(folder)) == pipelines[pipeline]
        else:
            with pytest.raises(LoraCompressError, match=f"{pipeline}.*single file"):
                ext.detect_model_type(str(folder))


@pytest.mark.parametrize(("kind", "given"), [("flux", []), ("flux", ["--model_type=flux"]), ("chroma", ["--model_type=chroma"])])
def test_the_flux_trainer_gets_its_own_model_type(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, given: list[str]
) -> None:
    argv = ["--network_module=networks.lora_compress", "--network_args", "split_qkv=True", "--quantization", "bits=4", *given]
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    args = ext.parse_arguments(argv, ext.HOSTS[kind])
    assert args.model_type == kind
    assert args.network_args == ["split_qkv=True", "bits=4"]


def test_help_is_that_of_the_trainer_that_is_named(ext: ModuleType) -> None:
    assert ext.choose_host(["--model_type=flux", "--help"]) is ext.HOSTS["flux"]
    assert ext.choose_host(["-h"]) is ext.HOSTS["sd"]


def test_a_flux_model_of_the_usual_size_is_built_as_ever(sd_scripts: Path) -> None:
    """The sizes that are read from the shapes of the host's own models, built without memory, are its constants."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    flux_models, sizes = importlib.import_module("library.flux_models"), importlib.import_module("library.compress_flux")
    usual = flux_models.configs["dev"]
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    t5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    with torch.device("meta"):
        found = {
            "_transformer": flux_models.Flux(usual.params),
            "_autoencoder": flux_models.AutoEncoder(usual.ae_params),
            "_clip": CLIPTextModel(CLIPTextConfig(vocab_size=49408, **clip)),
            "_t5": T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **t5)),
        }
    read = {
        name: getattr(sizes, name)({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})
        for name, model in found.items()
    }
    assert read["_transformer"].items() <= vars(usual.params).items()
    assert read["_autoencoder"].items() <= vars(usual.ae_params).items()
    assert read["_clip"] == {**clip, "vocab_size": 49408, "projection_dim": 768}
    assert read["_t5"] == t5


def test_a_file_that_is_no_part_of_flux_is_named(ext: ModuleType, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "ae.safetensors", ["encoder.conv_in.weight"])
    options = argparse.Namespace(pretrained_model_name_or_path=None, ae=file, clip_l=None, t5xxl=None)
    with pytest.raises(LoraCompressError, match=r"ae=.*ae\.safetensors: has no encoder\.down\.0"):
        ext.HOSTS["flux"].adapt(options)


@pytest.mark.parametrize("kind", ["hunyuan_image", "anima"])
def test_what_the_hosts_scripts_do_before_training_is_done(ext: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", "--attn_mode=sdpa"])
    assert ext.parse_arguments(["--attn_mode=sdpa"], ext.HOSTS[kind]).attn_mode == "torch"


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "chroma", "lumina", "hunyuan_image", "anima"])
def test_every_trainer_parses_and_can_be_mixed_with_ours(ext: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    host, network_trainer = ext.HOSTS[kind], importlib.import_module("train_network").NetworkTrainer
    argv = ["--network_module=networks.lora_compress", "--network_args", "rank_dropout=0.1", "--pruning", "rank_ratio=0.5"]
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    args = ext.parse_arguments(argv, host)
    assert args.model_type == kind and args.network_args == ["rank_dropout=0.1", "rank_ratio=0.5"]
    assert args.evaluation is None
    assert not {f.name for f in fields(EvaluationSettings)} & vars(args).keys()  # the host puts keys of sections among its options
    theirs = getattr(importlib.import_module(host.script), host.trainer)
    trainer = type("Mixed", (ext.CompressTrainerMixin, ext.ValidationMixin, theirs), {})()
    assert isinstance(trainer, network_trainer)
    if host.timesteps and hasattr(args, "show_timesteps"):  # 0.11
        assert callable(importlib.import_module(host.timesteps).show_timesteps)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["pretrained_model_name_or_path: not set"]),
        (["--pretrained_model_name_or_path=./absent.safetensors"], ["./absent.safetensors", "no such file"]),
        (["--pretrained_model_name_or_path=/absent/folder"], ["/absent/folder", "no such file"]),
        (
            ["--pretrained_model_name_or_path=/", "--model_type=flex"],
            ["model_type=flex", "sd, sdxl, sd3, flux, chroma, lumina, hunyuan_image, anima, auto"],
        ),
        (["--pretrained_model_name_or_path=/"], ["model_index.json"]),
    ],
)
def test_a_model_that_is_missing_or_unknown_is_named(ext: ModuleType, argv: list[str], parts: list[str]) -> None:
    with pytest.raises(LoraCompressError) as caught:
        ext.choose_host(argv)
    for part in parts:
        assert part in str(caught.value)


def test_a_damaged_checkpoint_is_named(ext: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(LoraCompressError, match=r"cut\.safetensors"):
        ext.detect_model_type(str(tmp_path / "cut.safetensors"))


@pytest.mark.parametrize(
    ("kind", "unet", "message"),
    [
        ("sd", {"block_out_channels": [32, 64], "layers_per_block": 1}, "layers_per_block is 1, must be 2"),
        ("sdxl", {"block_out_channels": [32, 64, 64]}, "1 : 2 : 4"),
        ("sdxl", {"block_out_channels": [32, 64, 128], "transformer_layers_per_block": [0, 2, 10]}, "transformer_layers_per_block"),
    ],
)
def test_a_unet_that_differs_in_more_than_widths_is_refused(
    ext: ModuleType, tmp_path: Path, kind: str, unet: dict, message: str
) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(unet))
    with pytest.raises(LoraCompressError, match=message):
        ext.HOSTS[kind].adapt(argparse.Namespace(pretrained_model_name_or_path=str(tmp_path)))
