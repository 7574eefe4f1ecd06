"""What the programs ask of a plain file: the rules as data, and diffusers itself loading what they make of a LoRA."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from core.factories import dense, random_update
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_compress import CompressionSettings, LowRankUpdate, SettingsError, as_kohya, compress_file
from lora_compress.layouts.plain import FP8
from lora_compress.programs.table import CONSUMERS, ConsumerRules, PlannedFile, PlannedModule, opened_by

UNET, TEXT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", "lora_te_text_model_encoder_layers_0_mlp_fc1"


def planned(**changes: Any) -> PlannedFile:
    modules = {UNET: PlannedModule(8, 8.0, "U-Net"), TEXT: PlannedModule(4, 4.0, "text encoder")}
    return dataclasses.replace(PlannedFile("kohya", torch.float16, "kohya", "sd1", modules), **changes)


def rules(*names: str) -> ConsumerRules:
    return ConsumerRules.named(names)


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_usual_file_is_loaded_by_all(name: str) -> None:
    assert rules(name).problems(planned()) == []
    assert rules(name).notes(planned()) == []


def test_all_means_every_program() -> None:
    assert {consumer.name for consumer in rules("all").consumers} == set(CONSUMERS)
    assert rules("comfyui", " ComfyUI ") == rules("comfyui")
    assert rules().problems(planned(save_format="packed")) == []
    with pytest.raises(SettingsError, match=r"for=comfy: must be one of comfyui, a1111, .*sdcpp, all"):
        rules("diffusers", "comfy")


@pytest.mark.parametrize(
    ("names", "layout", "alpha", "ranks"),
    [
        (["comfyui", "a1111", "forge", "invokeai"], "kohya", None, (8, 1, 4)),
        (["sdcpp"], "kohya", None, (8, 2, 4)),
        (["diffusers"], "kohya", 1.0, (8, 1, 4)),
        (["diffusers"], "peft", None, (8, 8, 4)),
        (["diffusers-0.40"], "kohya", 1.0, (8, 1, 4)),
        (["diffusers-0.40"], "peft", None, (8, 1, 4)),
        (["diffusers-0.32"], "kohya", 1.0, (8, 8, 4)),
        (["sdcpp", "diffusers"], "kohya", 1.0, (8, 2, 4)),
        (["all"], "kohya", 1.0, (8, 8, 4)),
    ],
)
def test_what_is_adapted_for_whom(names: list[str], layout: str, alpha: float | None, ranks: tuple[int, ...]) -> None:
    modules = {
        UNET: PlannedModule(8, 8.0, "U-Net"),
        UNET + "2": PlannedModule(1, 1.0, "U-Net"),
        TEXT: PlannedModule(4, 4.0, "text"),
    }
    file = planned(modules=modules, layout=layout)
    adaptation = rules(*names).adaptation(file)
    assert adaptation.alpha == alpha
    assert tuple(adaptation.ranks.values()) == ranks
    padded = sum(new > module.rank for new, module in zip(ranks, modules.values(), strict=True))
    assert rules(*names).notes(file) == ([f"{padded} of 3 modules padded with zeros to rank 8"] if padded else [])


@pytest.mark.parametrize("alpha", [-4.0, 0.0])
def test_an_alpha_that_is_not_positive_is_folded_for_diffusers(alpha: float) -> None:
    file = planned(modules={UNET: PlannedModule(4, alpha, "U-Net")})
    assert rules("diffusers").adaptation(file).alpha == 1.0
    assert rules("comfyui").adaptation(file).alpha is None


def test_lora_mid_is_merged_where_a_program_refuses_it() -> None:
    file = planned(modules={UNET: PlannedModule(4, 4.0, "U-Net", (UNET + ".lora_mid.weight",))})
    assert rules("comfyui", "diffusers").adaptation(file).merge_mid == (UNET,)
    assert rules("comfyui").adaptation(file).merge_mid == ()
    assert rules("all").problems(file) == []


def with_dora(family: str) -> PlannedFile:
    return planned(family=family, modules={UNET: PlannedModule(4, 4.0, "U-Net", (UNET + ".dora_scale",))})


def with_others(count: int, family: str = "sd1", ending: str = ".strength") -> PlannedFile:
    return planned(family=family, others=tuple(f"bundle_emb.x{index}{ending}" for index in range(count)))


NO_TEXT_KEYS = planned(modules={"lora_unet_mid_block_attentions_0_proj_in": PlannedModule(4, 4.0)})
PROBLEMS = {
    "packed": ("invokeai", planned(save_format="packed"), "InvokeAI cannot read packed files: set save_format=kohya"),
    "packed, others": (
        "diffusers",
        dataclasses.replace(with_others(1), save_format="packed"),
        r"load_lora refuses .*bundle_emb\.x0",
    ),
    "fp8 for FLUX": ("diffusers", planned(save_format="fp8", family="flux1"), "diffusers loads fp8.*sdxl.*flux1.*save_precision"),
    "fp8 by its dtype": ("diffusers-0.32", planned(dtype=FP8, family="wan"), r"diffusers 0\.32 loads fp8 .*wan"),
    "others": ("diffusers", with_others(1), r"diffusers refuses files with keys such as bundle_emb\.x0.*take them out"),
    "others in InvokeAI": ("invokeai", with_others(2), r"InvokeAI refuses files with keys such as bundle_emb.*\(2 of them"),
    "many others": ("forge", with_others(13), "more than 12 keys.*has 13"),
    "dora for FLUX": ("diffusers", with_dora("flux1"), "diffusers refuses .*dora_scale"),
    "names": ("diffusers", planned(modules={"lora_prior_x": PlannedModule(4, 4.0)}), "diffusers refuses sd1.*lora_prior_x"),
    "no attention left": ("invokeai", NO_TEXT_KEYS, "knows an SD LoRA by its attn2_to_k.*keep at least one"),
}


@pytest.mark.parametrize(("name", "file", "pattern"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_what_cannot_be_loaded_is_told_with_its_remedy(name: str, file: PlannedFile, pattern: str) -> None:
    (problem,) = rules(name).problems(file)
    assert re.search(pattern, problem)
    assert rules(*(other for other in ("comfyui", "a1111") if name != "all")).problems(file) == []


def test_invokeai_refuses_sdxl_names_of_sd() -> None:
    (problem,) = rules("invokeai").problems(planned(family="sdxl"))
    assert "lora_te_text_model" in problem


def test_packed_files_need_our_parts_in_the_programs() -> None:
    ours, packed = rules("comfyui", "a1111", "forge", "diffusers"), planned(save_format="packed")
    assert ours.problems(packed) == []
    assert [note.rpartition(" with ")[2] for note in ours.notes(packed)] == [
        "the plug-in for ComfyUI",
        *["the extension for AUTOMATIC1111, Forge, Forge Neo and reForge"] * 2,
        "lora_compress.diffusers.load_lora",
    ]


def test_what_a_program_drops_is_told() -> None:
    (note, other) = rules("all").notes(with_dora("sd1"))[-2:]
    assert note.startswith("diffusers 0.32 drops dora_scale of 1 modules")
    assert other.startswith("stable-diffusion.cpp drops dora_scale")
    assert rules("comfyui", "a1111", "forge", "invokeai").notes(with_dora("sd1")) == []
    assert rules("comfyui").notes(with_others(3)) == ["ComfyUI leaves out 3 other tensors, bundle_emb.x0.strength among them"]
    assert rules("comfyui", "forge").notes(with_others(3, ending=".diff_b")) == []
    assert rules("forge").problems(with_others(12)) == []


def test_opened_by_names_what_loads_the_format() -> None:
    assert opened_by("packed", "sd1").startswith("LoRA Compress alone")
    assert "diffusers" in opened_by("kohya", "flux1")
    assert "diffusers" in opened_by("fp8", "sdxl")
    assert "diffusers" not in opened_by("fp8", "flux1")
    assert "diffusers for SD and SDXL" in opened_by("fp8")


# -- diffusers itself ---------------------------------------------------------------------------------------------------

TARGETS = re.compile(r"(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out|[qkv]_proj|out_proj|fc[12])$")


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory, sd_scripts: Path) -> Path:
    from models import write_random_sd

    return write_random_sd(tmp_path_factory.mktemp("consumer") / "sd")


def open_pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None, torch_dtype=torch.float32)


def models_of(pipeline: Any) -> dict[str, Any]:
    return {"lora_unet_": pipeline.unet, "lora_te_": pipeline.text_encoder}


def varied_updates(pipeline: Any) -> dict[str, LowRankUpdate]:
    """Ranks from 1 to 6 and alphas of every kind, on the first layers of both models."""
    updates: dict[str, LowRankUpdate] = {}
    for prefix, model in models_of(pipeline).items():
        layers = {name: layer for name, layer in model.named_modules() if TARGETS.search(name) and hasattr(layer, "weight")}
        for name, layer in list(layers.items())[:14]:
            out, inputs, *kernel = layer.weight.shape
            number = len(updates)
            update = random_update(1 + number % 6, inputs, out, tuple(kernel), 0.5 + number % 5, number, 0.1)
            updates[prefix + name.replace(".", "_")] = update
    return updates


def loaded(pipeline: Any) -> dict[str, Tensor]:
    """The updates that diffusers computes, dense, by kohya's names."""
    found = {}
    for prefix, model in models_of(pipeline).items():
        for name, layer in model.named_modules():
            for adapter in getattr(layer, "lora_A", {}):
                factors = layer.lora_B[adapter].weight.double().flatten(1), layer.lora_A[adapter].weight.double().flatten(1)
                found[prefix + name.replace(".", "_")] = layer.scaling[adapter] * factors[0] @ factors[1]
    return found


def wrong(folder: Path, updates: dict[str, LowRankUpdate], tensors: dict[str, Tensor], tolerance: float = 1e-5) -> int:
    pipeline = open_pipeline(folder)
    pipeline.load_lora_weights(dict(tensors))
    found = loaded(pipeline)
    assert found.keys() == updates.keys()
    return sum(float((found[name] - dense(u)).norm() / dense(u).norm()) > tolerance for name, u in updates.items())


def written(updates: dict[str, LowRankUpdate], folder: Path, dtype: torch.dtype, *consumers: str) -> dict[str, Tensor]:
    """All of `updates` in a plain file for `consumers`."""
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, folder / "in.safetensors")
    settings = CompressionSettings.parse({"allow_larger": True} | ({"save_format": "fp8"} if dtype == FP8 else {}))
    precision = None if dtype == FP8 else dtype
    compress_file(folder / "in.safetensors", folder / "out.safetensors", settings, save_dtype=precision, consumers=consumers)
    return load_file(folder / "out.safetensors")


def test_diffusers_0_32_loads_what_is_adapted_for_it_and_mistakes_the_rest(pipeline_folder: Path, tmp_path: Path) -> None:
    import diffusers

    updates = varied_updates(open_pipeline(pipeline_folder))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (FP8, 0.08)):
        right = written(updates, tmp_path, dtype, "diffusers-0.32")
        assert wrong(pipeline_folder, updates, right, tolerance) == 0
    unpadded = written(updates, tmp_path, torch.float32)
    if diffusers.__version__.startswith("0.32"):
        assert wrong(pipeline_folder, updates, unpadded) > 0  # the reason for the rule; newer releases read it right
    else:
        assert wrong(pipeline_folder, updates, unpadded) == 0


def test_diffusers_refuses_the_keys_that_we_say_it_refuses(pipeline_folder: Path, tmp_path: Path) -> None:
    updates = varied_updates(open_pipeline(pipeline_folder))
    tensors = written(updates, tmp_path, torch.float32)
    name = next(iter(updates))
    for strange in ("bundle_emb.x.string_to_param.*", name + ".lora_mid.weight", name + ".diff_b"):
        with pytest.raises(ValueError, match=r"not been correctly renamed|[Ii]nvalid|Incompatible"):
            open_pipeline(pipeline_folder).load_lora_weights(tensors | {strange: torch.zeros(2)})
    open_pipeline(pipeline_folder).load_lora_weights(tensors | {name + ".dora_scale": torch.ones(1)})  # dropped, with a warning
