"""The modules by which programs recognise a file stay in it, however weak they are and whatever prunes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core.factories import random_update
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_compress import CompressionSettings, SettingsError, as_kohya, compress, compress_file
from lora_compress.programs.marks import MARKS, is_taken_whole, missing_of_whole, recognition_marks

ATTN2 = [
    ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", "lora_unet_mid_block_attn2_to_v"),
    ("unet.down_blocks.0.attn2.to_k", "unet.mid_block.attn2.to_v"),
    ("unet.down_blocks.0.attn2.processor.to_k_lora", "unet.mid_block.attn2.processor.to_v_lora"),
]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("names", ATTN2)
def test_the_strongest_cross_attention_projection_is_what_programs_need(names: tuple[str, str], family: str) -> None:
    others = {"lora_unet_a_attn1_to_k": 99.0, "lora_unet_a_attn2_to_q": 99.0, "lora_te_a_self_attn_q_proj": 99.0}
    assert set(recognition_marks({names[0]: 1.0, names[1]: 2.0, **others}, family)) == {names[1]}
    assert set(recognition_marks({names[0]: 3.0, names[1]: 2.0, **others}, family)) == {names[0]}


def test_files_without_cross_attention_are_known_by_something_else() -> None:
    text = {"lora_te_text_model_encoder_layers_0_self_attn_q_proj": 1.0, "lora_te_text_model_encoder_layers_0_mlp_fc1": 5.0}
    assert set(recognition_marks(text)) == {"lora_te_text_model_encoder_layers_0_self_attn_q_proj"}
    resnet = {"lora_unet_down_blocks_0_resnets_0_time_emb_proj": 0.5}
    assert set(recognition_marks({**text, **resnet}, "sd1")) == set(resnet)
    assert recognition_marks({"lora_unet_double_blocks_0_img_attn_qkv": 1.0}) == {}
    both = {f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj": 1.0 for number in (1, 2)}
    assert recognition_marks(both, "sdxl").keys() == both.keys()
    deep = "lora_unet_input_blocks_8_1_transformer_blocks_5_attn1_to_q"
    assert set(recognition_marks({**both, deep: 0.1, deep.replace("_5_", "_1_"): 9.0}, "sdxl")) == {deep}


def kohya(name: str) -> tuple[str, str]:
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


def peft(name: str) -> tuple[str, str]:
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def xlabs(name: str) -> tuple[str, str]:
    return f"{name}.down.weight", f"{name}.up.weight"


def blocks(form: str, count: int = 3) -> list[str]:
    return [form.format(number) for number in range(count)]


HV = "diffusion_model.double_blocks.{}."
FILES = {  # keys of a module, modules by which the file is recognised, other modules
    "Wan Fun": (kohya, ["lora_unet__blocks_0_cross_attn_k"], blocks("lora_unet__blocks_{}_self_attn_q")),
    "BFL control": (peft, ["img_in"], blocks("double_blocks.{}.img_attn.proj")),
    "USO": (
        xlabs,
        ["single_blocks.37.processor.qkv_lora", "double_blocks.18.processor.qkv_lora2"],
        blocks("double_blocks.{}.processor.proj_lora1"),
    ),
    "Wan I2V": (
        peft,
        [f"diffusion_model.blocks.0.cross_attn.{letter}_img" for letter in "kv"],
        blocks("diffusion_model.blocks.{}.ffn.0"),
    ),
    "Wan I2V of diffusers": (
        peft,
        [f"transformer.blocks.0.attn2.add_{letter}_proj" for letter in "kv"],
        blocks("transformer.blocks.{}.attn1.to_q"),
    ),
    "HunyuanVideo": (peft, [HV.format(0) + "img_attn_qkv"], blocks(HV + "txt_attn_qkv")),
    "FLUX.1 of diffusers": (
        peft,
        ["transformer.single_transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.add_q_proj"],
        blocks("transformer.transformer_blocks.{}.ff.net.0.proj"),
    ),
    "FLUX.2": (
        peft,
        ["diffusion_model.double_blocks.0.img_attn.proj", "diffusion_model.double_blocks.0.img_mlp.0"],
        blocks("diffusion_model.single_blocks.{}.linear1"),
    ),
    "SDXL": (
        kohya,
        ["lora_unet_input_blocks_8_1_transformer_blocks_0_attn2_to_k"],
        blocks("lora_unet_input_blocks_8_1_transformer_blocks_{}_attn1_to_q"),
    ),
}
PRUNING: list[dict[str, object]] = [
    {"layer_threshold": 0.1, "rank_ratio": 0.9},
    {"norm_threshold": 0.5, "rank_ratio": 0.5},
    {"target_error": 0.3},
    {"layer_threshold": 0.1, "bits": 4},
]


def weak_and_strong(name: str, scale: float = 1e-3) -> dict[str, Tensor]:
    """A file in which the modules that tell what it is are a thousand times weaker than the others."""
    keys, marks, others = FILES[name]
    tensors = {}
    for number, module in enumerate([*marks, *others]):
        update = random_update(6, 32, 24, (), 6.0, number, scale if module in marks else 1.0)
        tensors |= dict(zip(keys(module), (update.down, update.up), strict=True))
        if keys is kohya:
            tensors[f"{module}.alpha"] = torch.tensor(6.0)
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


@pytest.mark.parametrize("settings", PRUNING, ids=str)
@pytest.mark.parametrize("name", FILES)
def test_marks_stay_whatever_prunes(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    keys, marks, _ = FILES[name]
    save_file(weak_and_strong(name), tmp_path / "in.safetensors")
    report = compress_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", CompressionSettings.parse(settings))
    kept = {module.name: module.rank[1] for module in report.modules}
    for mark in marks:
        assert any(rank and mark.startswith(module) for module, rank in kept.items()), kept
    if report.settings["save_format"] != "packed":
        assert all(load_file(tmp_path / "out.safetensors").keys() >= set(keys(mark)) for mark in marks)


def test_a_note_says_what_was_kept_and_why(tmp_path: Path) -> None:
    """Where another module of the same weakness went."""
    tensors = weak_and_strong("Wan Fun") | {
        key.replace("blocks_0_cross", "blocks_1_cross"): tensor for key, tensor in weak_and_strong("Wan Fun").items()
    }
    save_file(tensors, tmp_path / "in.safetensors")
    settings = CompressionSettings.parse({"layer_threshold": 0.01, "rank_ratio": 0.7})
    report = compress_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", settings, save_dtype=torch.float32)
    assert [note for note in report.notes if "recognises" in note] == [
        "lora_unet__blocks_0_cross_attn_k keeps one component: ComfyUI recognises a Wan Fun LoRA by it"
    ]
    assert not any("blocks_1_cross" in key for key in load_file(tmp_path / "out.safetensors"))
    save_file(weak_and_strong("Wan Fun", 1.0), tmp_path / "in.safetensors")
    report = compress_file(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", CompressionSettings.parse({"rank_ratio": 0.7})
    )
    assert not any("recognises" in note for note in report.notes)


def test_marks_stay_in_memory_too() -> None:
    weak, strong = "lora_unet__blocks_0_cross_attn_k", "lora_unet__blocks_0_self_attn_q"
    updates = {name: random_update(4, 16, 16, (), 4.0, 1, scale) for name, scale in ((weak, 1e-3), (strong, 1.0))}
    assert compress(updates, CompressionSettings.parse({"layer_threshold": 0.1})).updates.keys() == updates.keys()


def test_every_mark_says_where_it_was_read() -> None:
    assert all(mark.source and mark.program and mark.groups for mark in MARKS)


WAN = [f"{where}_attn_{what}" for where in ("self", "cross") for what in "qkvo"] + ["ffn_0", "ffn_2"]


def test_diffusers_gets_every_module_of_a_wan_file_in_kohya_names(tmp_path: Path) -> None:
    names = [f"lora_unet_blocks_{block}_{module}" for block in range(2) for module in WAN]
    assert is_taken_whole(names) and missing_of_whole(names) == []
    assert missing_of_whole(names[1:]) == names[:1]
    assert not is_taken_whole(["lora_unet_double_blocks_0_img_attn_qkv", "transformer.blocks.0.attn1.to_q"])
    updates = {name: random_update(16, 32, 24, (), 4.0, i, 1e-3 if i % 3 else 1.0) for i, name in enumerate(names)}
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    settings = CompressionSettings.parse({"layer_threshold": 0.01, "new_rank": 4})
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, source)
    for consumers, modules in (((), 7), (("diffusers",), 20)):
        compress_file(source, target, settings, consumers=consumers, save_dtype=torch.float32)
        assert sum(key.endswith(".alpha") for key in load_file(target)) == modules
    del updates[names[3]]
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, source)
    with pytest.raises(SettingsError, match=f"refuses wan files with {names[3]} missing"):
        compress_file(source, target, settings, consumers=("diffusers",))
