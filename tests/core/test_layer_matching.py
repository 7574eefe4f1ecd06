"""Two layouts of one LoRA: their common modules are found, whichever names the layers have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from core.factories import random_update
from safetensors.torch import save_file

from lora_compress import LowRankUpdate
from lora_compress.inspection.comparison import compare_files
from lora_compress.names.matching import match_layers
from lora_compress.update import ModuleShape

SD = {  # kohya's names with diffusers' paths: the same in original ones, in diffusers' and for old attention processors
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q",
    ),
    "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0": (
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_out_0",
        "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn2.processor.to_out",
    ),
    "lora_unet_mid_block_attentions_0_proj_in": (
        "lora_unet_middle_block_1_proj_in",
        "unet.mid_block.attentions.0.proj_in",
        "mid_block.attentions.0.proj_in",
    ),
}
ENDINGS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "PEFT": (".lora_A.weight", ".lora_B.weight"),
    "diffusers": (".lora.down.weight", ".lora.up.weight"),
    "processors": ("_lora.down.weight", "_lora.up.weight"),
}
SPELLINGS: dict[str, tuple[str, Callable[[str], str]]] = {
    "kohya": ("kohya", lambda name: name),
    "kohya, original": ("kohya", lambda name: SD[name][0]),
    "diffusers": ("PEFT", lambda name: SD[name][1]),
    "diffusers before PEFT": ("diffusers", lambda name: SD[name][1]),
    "PEFT": ("PEFT", lambda name: f"base_model.model.{SD[name][1].removeprefix('unet.')}"),
    "PEFT of a pipeline": ("PEFT", lambda name: f"base_model.model.{SD[name][1]}"),
    "attention processors": ("processors", lambda name: SD[name][2]),
}


def write(path: Path, layout: str, updates: dict[str, LowRankUpdate]) -> Path:
    down, up = ENDINGS[layout]
    tensors = {}
    for name, update in updates.items():
        tensors[name + down], tensors[name + up] = update.down.contiguous(), (update.up * update.scale).contiguous()
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("two", SPELLINGS)
@pytest.mark.parametrize("one", SPELLINGS)
def test_one_lora_in_two_layouts_has_no_difference(one: str, two: str, tmp_path: Path) -> None:
    updates = {name: random_update(3, seed=seed) for seed, name in enumerate(SD)}
    paths = []
    for spelling in (one, two):
        layout, spell = SPELLINGS[spelling]
        paths.append(write(tmp_path / f"{len(paths)}.safetensors", layout, {spell(name): u for name, u in updates.items()}))
    found = compare_files(*paths)
    assert len(found.modules) == len(SD) and found.missing == ((), ())
    assert found.relative_error < 1e-6


def test_a_text_encoder_of_peft_meets_the_encoder_of_its_size(tmp_path: Path) -> None:
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    small, large = random_update(2, inputs=12, outputs=12, seed=1), random_update(2, inputs=20, outputs=20, seed=2)
    flat = path.replace(".", "_")
    both = write(tmp_path / "both.safetensors", "kohya", {f"lora_te1_{flat}": small, f"lora_te2_{flat}": large})
    for update, name in ((small, "lora_te1"), (large, "lora_te2")):
        alone = write(tmp_path / "alone.safetensors", "PEFT", {f"base_model.model.{path}": update})
        found = compare_files(both, alone)
        assert {m.name: m.relative_error for m in found.modules if m.rank[1]} == {f"{name}_{flat}": pytest.approx(0.0, abs=1e-6)}


def test_what_could_be_either_of_two_is_neither() -> None:
    size = ModuleShape(8, 8, (), 2)
    encoders = {"lora_te1_text_model_x": size, "lora_te2_text_model_x": size}
    assert match_layers(encoders, {"base_model.model.text_model.x": size}) == {}
    assert match_layers({"lora_te1_text_model_x": size}, {"text_encoder_2.text_model.x": size}) == {}


def test_flux_layers_are_matched_where_both_have_them_whole(tmp_path: Path) -> None:
    def update(outputs: int, seed: int) -> LowRankUpdate:
        return random_update(2, inputs=12, outputs=outputs, seed=seed)

    whole = {"img_attn_proj": "attn.to_out.0", "txt_mlp_0": "ff_context.net.0.proj", "img_mod_lin": "norm1.linear"}
    kohya = {f"lora_unet_double_blocks_3_{name}": update(12, seed) for seed, name in enumerate(whole)}
    diffusers = {f"transformer.transformer_blocks.3.{name}": update(12, seed) for seed, name in enumerate(whole.values())}
    kohya["lora_unet_double_blocks_3_img_attn_qkv"] = update(36, 9)
    diffusers |= {f"transformer.transformer_blocks.3.attn.to_{part}": update(12, 10) for part in "qkv"}
    found = compare_files(write(tmp_path / "a.safetensors", "kohya", kohya), write(tmp_path / "b.safetensors", "PEFT", diffusers))
    assert [len(names) for names in found.missing] == [3, 1]
    assert all(m.relative_error < 1e-6 for m in found.modules if all(m.rank))
    assert [note for note in found.notes if "a.safetensors: modules of fused layers (1)" in note]


def test_real_files_of_four_layouts_have_all_modules_in_common(real_lora: Callable[[str], Path]) -> None:
    names = ("diffusers_pokemon_seed42.safetensors", "diffusers_attn_processors.safetensors", "peft_unet_partly_zero")
    for name in names[1:]:
        found = compare_files(real_lora(names[0]), real_lora(name))
        assert len(found.modules) == 128 and found.missing == ((), ())
    kohya = compare_files(real_lora("lycoris_smart_falcon_4_lokr.safetensors"), real_lora("peft_clip_text_encoder"))
    assert len(kohya.missing[1]) == 350 - 24 and not kohya.missing[0]


def test_thousands_of_modules_are_matched() -> None:
    shapes = {f"base_model.model.blocks.{i}.attn.to_q": ModuleShape(8, 8, (), 2) for i in range(5000)}
    assert len(match_layers(shapes, {f"lora_unet_blocks_{i}_attn_to_q": ModuleShape(8, 8, (), 2) for i in range(5000)})) == 5000
