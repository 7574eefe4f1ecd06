"""What is no LoRA is refused in one line that says what it is, by every way in."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from core.layouts.files import random, save
from torch import Tensor

from lora_compress import CompressionSettings, FormatError, load_lora, open_lora
from lora_compress.engine.to_file import compress_file
from lora_compress.engine.unpack import expand_file
from lora_compress.inspection.comparison import compare_files
from lora_compress.inspection.file import inspect_file
from lora_compress.programs.check import check_file

ONES = torch.ones(4, 4)
LORA = {"lora_unet_x.lora_down.weight": random(2, 3), "lora_unet_x.lora_up.weight": random(4, 2)}

BYTES: dict[str, tuple[bytes, str]] = {
    "a.safetensors": (b"", "empty file: get it again"),
    "a.pt": (b"", "empty file: get it again"),
    "b.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "b.ckpt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "c.safetensors": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "d.gguf": (b"GGUF\3\0\0\0" + bytes(100), "GGUF file"),
    "d.safetensors": (b"GGUF\3\0\0\0" + bytes(100), "GGUF file"),
    "adapter_config.json": (b'{"r": 4}', "JSON text"),
    "README.md": (b"# My LoRA\n\nTrigger words: cat.\n", 'text file that begins "# My LoRA'),
    "zeros.safetensors": (bytes(1000), "nothing but zeros"),
    "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG image"),
    "noise.bin": (bytes(range(128, 256)), "no file of weights"),
    "pickle.bin": (b"\x80\x02}q\x00garbage", "damaged or cut short"),
}
TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "VAE": ({"decoder.conv_in.weight": ONES, "encoder.down.0.block.0.conv1.weight": ONES, "quant_conv.weight": ONES}, "a VAE"),
    "checkpoint": (
        {
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": ONES,
            "first_stage_model.decoder.conv_in.weight": ONES,
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(320, 768),
        },
        "a full checkpoint of Stable Diffusion 1",
    ),
    "checkpoint of SDXL": (
        {
            "conditioner.embedders.1.model.ln_final.weight": torch.ones(4),
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(64, 2048),
        },
        "a full checkpoint of SDXL",
    ),
    "diffusion model": ({"double_blocks.0.img_attn.qkv.weight": torch.ones(6, 3072)}, "the diffusion model of FLUX.1 itself"),
    "embedding": ({"emb_params": ONES}, "a textual inversion embedding"),
    "embedding of SDXL": ({"clip_g": ONES, "clip_l": ONES}, "a textual inversion embedding"),
    "embedding of diffusers": ({"<cat>": torch.ones(768)}, "a textual inversion embedding"),
    "ControlNet": ({"control_model.input_hint_block.0.weight": ONES}, "a ControlNet"),
    "CLIP": ({"text_model.encoder.layers.0.mlp.fc1.weight": ONES}, "a CLIP text encoder"),
    "T5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": ONES}, "a T5 text encoder"),
    "Qwen": ({"model.layers.0.self_attn.q_proj.weight": ONES}, "a language model"),
    "OFT": ({"lora_unet_x.oft_blocks": torch.ones(2, 3, 3)}, "OFT or BOFT"),
    "OFT of PEFT": ({"base_model.model.x.oft_R.weight": ONES}, "OFT"),
    "BOFT": ({"base_model.model.x.boft_R": ONES, "base_model.model.x.boft_s": ONES}, "BOFT"),
    "IA3": ({"lora_unet_x.weight": ONES, "lora_unet_x.on_input": torch.tensor(True)}, "IA3"),
    "IA3 of PEFT": ({"base_model.model.x.ia3_l": ONES}, "IA3"),
    "VeRA": ({"base_model.model.x.vera_lambda_b": torch.ones(4), "base_model.vera_A": ONES}, "VeRA"),
    "SVDQuant": (
        {"transformer_blocks.0.qkv_proj.qweight": ONES.char(), "transformer_blocks.0.qkv_proj.wscales": ONES},
        "a model quantized by nunchaku",
    ),
    "LoRA of nunchaku": (
        {"transformer_blocks.0.attn.qkv_proj.lora_down": ONES, "transformer_blocks.0.attn.qkv_proj.lora_up": ONES},
        "a LoRA for nunchaku",
    ),
    "nothing known": ({"foo.bar": ONES}, "weights of an unknown kind"),
    "nothing": ({}, "a file without tensors"),
}


class _Code:
    pass


PICKLES: dict[str, tuple[Any, str]] = {
    "hypernetwork": ({768: ({"linear.0.weight": ONES}, {"linear.0.weight": ONES}), "name": "x", "step": 3}, "a hypernetwork"),
    "embedding": ({"string_to_token": {"*": 265}, "string_to_param": {"*": ONES}, "name": "x"}, "a textual inversion embedding"),
    "object": ({"a": _Code()}, r"holds a Python object, .*_Code, which may run code.*convert it to .safetensors"),
    "NumPy": ({"a": numpy.ones((3, 3))}, "holds a Python object, numpy"),
    "meta": ({"a": ONES.to("meta")}, "a: has a shape but no data"),
    "sparse": ({"a": ONES.to_sparse()}, "a: is a sparse_coo tensor, allowed: dense"),
    "list": ([1, 2], r"holds a list of 2 \(int\), not weights by key"),
    "tensor": (ONES, "holds a Tensor, not weights by key"),
    "empty": ({}, "holds no tensor"),
    "complex": ({**LORA, "x": ONES.to(torch.complex64)}, "x: is complex64, allowed: "),
    "complex factor": (
        {**LORA, "lora_unet_x.lora_up.weight": torch.ones(4, 2, dtype=torch.complex128)},
        "lora_up.weight: is complex128",
    ),
    "fnuz": ({**LORA, "x": ONES.to(torch.float8_e4m3fnuz)}, "x: is float8_e4m3fnuz, allowed: "),
    "fnuz factor": ({**LORA, "lora_unet_x.lora_up.weight": torch.ones(4, 2).to(torch.float8_e5m2fnuz)}, "is float8_e5m2fnuz"),
}


def refusal(path: Path, way: Callable[[Path], object] = open_lora) -> str:
    """The one line that a way into the program says of a file."""
    with pytest.raises(FormatError) as refused:
        way(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and "\n" not in message, message
    return message


def matches(pattern: str, message: str) -> None:
    with pytest.raises(FormatError, match=pattern):
        raise FormatError(message)


@pytest.mark.parametrize("name", BYTES)
def test_the_first_bytes_tell_what_a_file_is(name: str, tmp_path: Path) -> None:
    data, pattern = BYTES[name]
    (tmp_path / name).write_bytes(data)
    matches(pattern, refusal(tmp_path / name))


@pytest.mark.parametrize("name", TENSORS)
def test_the_keys_tell_what_weights_are_and_three_of_them_are_named(name: str, tmp_path: Path) -> None:
    tensors, pattern = TENSORS[name]
    message = refusal(save(tensors, tmp_path))
    matches(rf"it is {pattern}", message)
    assert all(key in message for key in sorted(tensors)[:3])


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    value, pattern = PICKLES[name]
    torch.save(value, tmp_path / "lora.pt")
    matches(pattern, refusal(tmp_path / "lora.pt"))


@pytest.mark.parametrize("name", ["README.md", "b.safetensors", "d.gguf", "VAE"])
def test_every_way_in_says_so(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    data, pattern = BYTES.get(name, (b"", "a VAE"))
    path = save(TENSORS[name][0], tmp_path) if name in TENSORS else tmp_path / name
    if data:
        path.write_bytes(data)
    for way in (
        lambda path: compress_file(path, out, CompressionSettings.parse({"rank_ratio": 0.5})),
        lambda path: inspect_file(str(path)),
        lambda path: compare_files(str(path), str(path)),
        lambda path: check_file(path, ()),
        lambda path: expand_file(path, out),
        load_lora,
    ):
        matches(pattern, refusal(path, way))
    assert not out.exists()


def test_a_truncated_download_says_how_much_is_there(tmp_path: Path) -> None:
    path = save(LORA, tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    matches(r"cut short: its header promises 56 bytes of data, the file has 48: get it again", refusal(path))


def test_names_that_lie_about_the_format(tmp_path: Path) -> None:
    """A safetensors file under the name of a PyTorch file is read; the reverse is told, since no program would open it."""
    path = save(LORA, tmp_path).rename(tmp_path / "lora.pt")
    assert list(open_lora(path)) == ["lora_unet_x"]
    torch.save(LORA, tmp_path / "lora.safetensors")
    matches("PyTorch file under another name: rename it to end in .pt", refusal(tmp_path / "lora.safetensors"))
    with zipfile.ZipFile(tmp_path / "lora.zip", "w") as archive:
        archive.writestr("lora.safetensors", b"x")
    matches("zip archive: unpack it first", refusal(tmp_path / "lora.zip"))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", "params"])
def test_weights_beside_other_things_are_taken_alone(wrapper: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.ckpt"
    torch.save({wrapper: LORA, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": ONES}}}}, path)
    source = open_lora(path)
    assert list(source) == ["lora_unet_x"] and not source.others


def test_dictionaries_of_models_become_keys_with_dots_and_bare_alphas_count(tmp_path: Path) -> None:
    path, (down, up) = tmp_path / "lora.pt", LORA.values()
    torch.save({"unet": {"x.lora.down.weight": down, "x.lora.up.weight": up, "x.alpha": 4}}, path)
    source = open_lora(path)
    assert list(source) == ["unet.x"] and source["unet.x"].scale == 2.0


def test_a_quantized_tensor_of_torch_is_read_as_what_it_stands_for(tmp_path: Path) -> None:
    path, (down, up) = tmp_path / "lora.pt", LORA.values()
    quantized = torch.quantize_per_tensor(up, 0.01, 3, torch.qint8)
    torch.save({"x.lora_down.weight": down, "x.lora_up.weight": quantized}, path)
    assert torch.equal(open_lora(path)["x"].up, quantized.dequantize())
