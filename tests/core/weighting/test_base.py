"""Norms of base layers: names across spellings, values against dense SVD, the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_compress import FormatError
from lora_compress.names.base_layers import layer_name, layers_of_key
from lora_compress.weighting import BaseNorm, base_norms, relative_scores, relative_weights
from lora_compress.weighting import base as base_module
from lora_compress.weighting.base import spectral_norm

# LDM path, diffusers path: of SD1 (tested against diffusers' own conversion below) and of SDXL's names.
SPELLINGS = [
    ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
    ("input_blocks.2.0.in_layers.2", "down_blocks.0.resnets.1.conv1"),
    ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
    ("input_blocks.4.0.skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
    ("middle_block.1.proj_in", "mid_block.attentions.0.proj_in"),
    ("middle_block.2.emb_layers.1", "mid_block.resnets.1.time_emb_proj"),
    ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
    ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
    ("output_blocks.8.1.transformer_blocks.0.ff.net.0.proj", "up_blocks.2.attentions.2.transformer_blocks.0.ff.net.0.proj"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.2", "conv_out"),
    ("label_emb.0.0", "add_embedding.linear_1"),
]


@pytest.mark.parametrize(("ldm", "diffusers"), SPELLINGS)
def test_every_spelling_of_a_layer_is_one_name(ldm: str, diffusers: str) -> None:
    names = {layer_name(f"lora_unet_{path.replace('.', '_')}") for path in (ldm, diffusers)}
    names |= {layer_name(f"{prefix}{diffusers}") for prefix in ("unet.", "base_model.model.unet.", "diffusion_model.")}
    assert len(names) == 1
    assert layer_name("unet.a.attn1.processor.to_out_lora") == layer_name("lora_unet_a_attn1_to_out_0")
    assert layer_name("lora_te_text_model_x") == layer_name("lora_te1_text_model_x") == layer_name("text_encoder.text_model.x")
    assert layer_name("lora_te2_text_model_x") != layer_name("lora_te1_text_model_x")


def test_ldm_names_are_those_of_diffusers_own_conversion(torchvision_repair: Path) -> None:
    """Every layer of an SD1 U-Net: the keys go in with numbers for weights and come out of diffusers' conversion by number."""
    keys = [f"model.diffusion_model.{key}" for key in _ldm_keys()]
    code = (
        "import json, sys\nfrom diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint as convert\n"
        "keys = json.load(sys.stdin)\nconfig = {'layers_per_block': 2, 'class_embed_type': None, 'addition_embed_type': None}\n"
        "print(json.dumps({number: key for key, number in convert({k: i for i, k in enumerate(keys)}, config).items()}))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(torchvision_repair)}
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(keys), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = {keys[int(number)]: key for number, key in json.loads(done.stdout.splitlines()[-1]).items()}
    checked = [key for key in keys if key in theirs and key.endswith(".weight") and "norm" not in theirs[key]]
    for key in checked:
        assert layers_of_key(key)[0].name == f"unet/{theirs[key].removesuffix('.weight').replace('.', '_')}"
    assert len(checked) > 250


def _ldm_keys() -> list[str]:
    """The keys of an SD1 U-Net in the LDM layout: 12 input blocks, the middle, 12 output blocks."""
    resnet = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"]
    block = "transformer_blocks.0."
    attention = ["norm", "proj_in", "proj_out", block + "ff.net.0.proj", block + "ff.net.2"]
    attention += [f"{block}attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")]
    attention += [f"{block}norm{n}" for n in (1, 2, 3)]
    layers = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    for i in range(1, 12):
        if i % 3 == 0:
            layers.append(f"input_blocks.{i}.0.op")
            continue
        layers += [f"input_blocks.{i}.0.{x}" for x in resnet] + [f"input_blocks.{i}.1.{x}" for x in attention if i < 9]
    layers += [f"middle_block.{n}.{x}" for n in (0, 2) for x in resnet] + [f"middle_block.1.{x}" for x in attention]
    for i in range(12):
        layers += [f"output_blocks.{i}.0.{x}" for x in resnet] + [f"output_blocks.{i}.1.{x}" for x in attention if i > 2]
        if i in (2, 5, 8):
            layers.append(f"output_blocks.{i}.{1 if i == 2 else 2}.conv")
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense_norm(weight: Tensor) -> BaseNorm:
    values = torch.linalg.svdvals(weight.flatten(1).double())
    return BaseNorm(float(values[0]), float(values.norm()))


@pytest.mark.parametrize("shape", [(5, 3), (60, 40), (300, 500), (900, 200), (320, 2880)])
def test_the_spectral_norm_is_the_largest_singular_value(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    exact = float(torch.linalg.svdvals(weight.double())[0])
    assert exact * 0.99 <= spectral_norm(weight) <= exact * 1.00001
    assert spectral_norm(weight) == spectral_norm(weight)
    spiked = weight + 100 * matrix(shape[0], 1, seed=1) @ matrix(1, shape[1], seed=2)
    assert spectral_norm(spiked) == pytest.approx(float(torch.linalg.svdvals(spiked.double())[0]), rel=1e-5)


def sdxl_like() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint in SGM layout, and by LoRA module name the weight that belongs to it."""
    fused = matrix(3 * 16, 16, seed=1)
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    q, conv = matrix(24, 24, seed=2), matrix(8, 6, 3, 3, seed=3)
    tensors = {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": q,
        "model.diffusion_model.input_blocks.2.0.in_layers.2.weight": conv,
        "model.diffusion_model.input_blocks.2.0.in_layers.2.bias": torch.ones(8),
        f"conditioner.embedders.0.transformer.{clip}.weight": matrix(12, 12, seed=4),
        "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight": fused,
        "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc.weight": matrix(32, 16, seed=5),
    }
    modules = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": q,
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": q,
        "unet.down_blocks.0.resnets.1.conv1": conv,
        f"lora_te1_{clip.replace('.', '_')}": matrix(12, 12, seed=4),
        "lora_te2_text_model_encoder_layers_3_self_attn_k_proj": fused[16:32],
        "lora_te2_text_model_encoder_layers_3_mlp_fc1": matrix(32, 16, seed=5),
    }
    return tensors, modules


def assert_norms(found: dict[str, BaseNorm], modules: dict[str, Tensor]) -> None:
    assert found.keys() == modules.keys()
    for name, weight in modules.items():
        assert found[name] == pytest.approx(dense_norm(weight), rel=1e-4), name


def test_norms_of_a_single_file_checkpoint(tmp_path: Path) -> None:
    tensors, modules = sdxl_like()
    save_file(tensors, tmp_path / "base.safetensors")
    found = base_norms(tmp_path / "base.safetensors", [*modules, "lora_unet_nowhere"], tmp_path / "cache")
    assert_norms(found, modules)


def test_norms_of_a_diffusers_folder_and_of_a_bare_transformer(tmp_path: Path) -> None:
    q, k = matrix(24, 24, seed=2), matrix(12, 20, seed=3)
    for folder, key, weight in (("unet", "mid_block.attn.to_q", q), ("text_encoder_2", "text_model.fc", k)):
        (tmp_path / folder).mkdir()
        save_file({f"{key}.weight": weight}, tmp_path / folder / "model.safetensors")
        save_file({f"{key}.weight": weight * 2}, tmp_path / folder / "model.fp16.safetensors")
    assert_norms(
        base_norms(tmp_path, ["unet.mid_block.attn.to_q", "lora_te2_text_model_fc"], tmp_path / "cache"),
        {"unet.mid_block.attn.to_q": q, "lora_te2_text_model_fc": k},
    )
    save_file({"double_blocks.0.img_attn.qkv.weight": q.to(torch.float8_e4m3fn)}, tmp_path / "flux.safetensors")
    for name in ("lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"):
        found = base_norms(tmp_path / "flux.safetensors", [name], tmp_path / "cache")
        assert_norms(found, {name: q.to(torch.float8_e4m3fn).float()})


def test_the_cache_saves_reading_and_is_rebuilt_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, modules = sdxl_like()
    path, cache = tmp_path / "base.safetensors", tmp_path / "cache"
    save_file(tensors, path)
    measured = []
    exact = base_module.spectral_norm
    monkeypatch.setattr(base_module, "spectral_norm", lambda weight: measured.append(1) or exact(weight))
    names = list(modules)
    base_norms(path, names[:1], cache)
    assert len(measured) == 1
    assert_norms(base_norms(path, names, cache), modules)
    assert len(measured) == 5  # two modules name the same layer
    assert_norms(base_norms(path, names, cache), modules)
    assert len(measured) == 5
    (file,) = cache.iterdir()
    for damage in (
        b"",
        b"{",
        b"[]",
        b'{"norms": {"unet/x": [1]}}',
        b'{"norms": {"unet/x": [2, NaN]}}',
        b"\xff\xfe",
        b'{"norms": 3}',
    ):
        file.write_bytes(damage)
        measured.clear()
        assert_norms(base_norms(path, names, cache), modules)
        assert len(measured) == 5
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, path)
    assert_norms(base_norms(path, names, cache), {name: weight * 2 for name, weight in modules.items()})


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, modules = sdxl_like()
    save_file(tensors, tmp_path / "base.safetensors")
    (tmp_path / "cache").write_text("a file, no folder")
    assert_norms(base_norms(tmp_path / "base.safetensors", modules, tmp_path / "cache"), modules)
    assert "not kept for the next time" in caplog.text


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, name = tmp_path / "base.safetensors", "lora_unet_a"
    with pytest.raises(FormatError, match="no checkpoint here"):
        base_norms(path, [name], tmp_path / "cache")
    path.write_bytes(b"garbage")
    with pytest.raises(FormatError, match="no safetensors file"):
        base_norms(path, [name], tmp_path / "cache")
    path.write_bytes((1 << 27).to_bytes(8, "little") + b"{" + b" " * (1 << 27))
    with pytest.raises(FormatError, match="a header of 134217728 bytes, allowed: "):
        base_norms(path, [name], tmp_path / "cache")
    save_file({"b.weight": matrix(3, 3)}, path)
    with pytest.raises(FormatError, match=r"none of 1 modules, lora_unet_a for one: give the base model"):
        base_norms(path, [name], tmp_path / "cache")
    save_file({"a.weight": torch.full((3, 3), float("nan"))}, path)
    with pytest.raises(FormatError, match=r"a\.weight holds NaN"):
        base_norms(path, [name], tmp_path / "cache")


def test_scores_and_weights_are_relative_to_the_norms() -> None:
    sigmas = {name: torch.tensor([4.0, 2.0]) for name in ("a", "b", "unknown", "zero")}
    norms = {"a": BaseNorm(2.0, 8.0), "b": BaseNorm(8.0, 8.0), "zero": BaseNorm(0.0, 0.0)}
    scores = {name: score.tolist() for name, score in relative_scores(sigmas, norms).items()}
    assert scores == {"a": [2.0, 1.0], "b": [0.5, 0.25], "unknown": [1.0, 0.5], "zero": [1.0, 0.5]}
    assert relative_weights(sigmas, norms, "frobenius") == pytest.approx(dict.fromkeys(sigmas, 1 / 64))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGBUS")
def test_a_checkpoint_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    tensors, modules = sdxl_like()
    path = tmp_path / "base.safetensors"
    save_file(tensors, path)
    script = (
        "import json, os, sys\nfrom lora_compress import FormatError\nfrom lora_compress.weighting import base\n"
        "exact, path = base.spectral_norm, sys.argv[1]\n"
        "base.spectral_norm = lambda weight: os.truncate(path, 4096) or exact(weight)\n"
        "try:\n    base.base_norms(path, json.loads(sys.argv[2]), sys.argv[3])\n"
        "except FormatError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", script, path, json.dumps(list(modules)), tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr  # a mapped file would end the process with SIGBUS
    assert "another program has written to the file since it was opened" in done.stdout
