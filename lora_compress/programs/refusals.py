"""Why a program would refuse a file, or load nothing of it: the rules on keys, names and precisions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from .marks import missing_of_whole

if TYPE_CHECKING:
    from .table import Consumer, PlannedFile

__all__ = ["DORA", "FP8_TYPES", "LAYOUTS_WITH_ALPHA", "SD", "problems_of"]

SD = frozenset({"sd1", "sd2", "sdxl"})
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
DORA = "dora_scale"
LAYOUTS_WITH_ALPHA = frozenset({"kohya", "loha", "lokr", "glora", "full"})  # converted modules are written as kohya's
_DIFFUSERS_PREFIXES = ("lora_te_", "lora_te1_", "lora_te2_", "lora_unet_")
_INVOKE_PREFIXES = ("lora_te1_", "lora_te2_", "lora_unet_")
_INVOKE_SD_MARKS = re.compile(r"attn2_to_[kv]$|time_emb_proj$|self_attn")  # by these InvokeAI knows the model of an SD file
_FLUX_WITHOUT_ALPHA = re.compile(r"^lora_unet_(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)(_|$)")
_WAN_FUN = "lora_unet__"
_NOT_CONVERTED = frozenset({"sd3", "lumina", "hunyuan_image", "anima"})  # their loaders look for other prefixes alone


def problems_of(consumer: Consumer, file: PlannedFile) -> list[str]:
    """Why `consumer` could not load `file`, a sentence each with its remedy."""
    if file.save_format == "packed":
        return _packed_problems(consumer, file)
    if file.layout == "cloneofsimo":
        remedy = (
            f"write it again with `resize_lora_ext.py --for {consumer.name}`, which names the layers of Stable Diffusion 1 and 2"
        )
        return [f"{consumer.title} does not know modules by numbers, such as unet:0:up: {remedy}"]
    found = []
    float8 = file.save_format == "fp8" or file.dtype in FP8_TYPES
    if float8 and consumer.fp8 is not None and file.family not in consumer.fp8:
        found.append(
            f"{consumer.title} loads fp8 LoRA of {', '.join(sorted(consumer.fp8))} alone, this one is for {file.family}: "
            "set save_format=kohya and save_precision=fp16 or bf16"
        )
    if float8 and not consumer.casts and file.family not in consumer.no_models_of:
        found.append(
            f"{consumer.title} multiplies factors in the precision of the file, which float8 cannot: "
            "set save_format=kohya and save_precision=bf16 or fp16"
        )
    strange = [key for key in consumer.strange(file.extras) if not (key.endswith("." + DORA) and file.family in SD)]
    if strange and consumer.refuses_in(file.family):
        found.append(f"{consumer.title} refuses files with keys such as {strange[0]} ({len(strange)} of them): take them out")
    elif consumer.tolerated is not None and len(strange) > consumer.tolerated:
        found.append(
            f"{consumer.title} does not apply a LoRA with more than {consumer.tolerated} keys that it does not know, "
            f"this one has {len(strange)}, {strange[0]} among them: take them out"
        )
    return found + _NAME_RULES.get(consumer.name, _no_rule)(consumer, file)


def _packed_problems(consumer: Consumer, file: PlannedFile) -> list[str]:
    if consumer.packed_with is None:
        return [f"{consumer.title} cannot read packed files: set save_format=kohya or fp8, or run `resize_lora_ext.py expand`"]
    if consumer.packed_factors_alone and file.extras:
        return [f"{consumer.packed_with} refuses tensors such as {file.extras[0]}: it applies pairs of factors alone"]
    return []


def _no_rule(consumer: Consumer, file: PlannedFile) -> list[str]:
    return []


def _diffusers_names(consumer: Consumer, file: PlannedFile) -> list[str]:
    """Each of its converters for files in kohya's layout takes certain names, and some of them take blocks as a whole."""
    if file.layout not in LAYOUTS_WITH_ALPHA:
        return []
    if file.family in _NOT_CONVERTED and any(name.startswith("lora_") for name in file.modules):
        return [
            f"{consumer.title} loads nothing of {file.family} files in kohya's layout: "
            "load it with lora_compress.diffusers.load_lora where that knows the model, or train in PEFT's layout"
        ]
    if file.family == "wan":
        return _wan_problem(consumer, file)
    if file.family == "flux1" and (strange := [name for name in file.modules if _FLUX_WITHOUT_ALPHA.match(name)]):
        return [f"{consumer.title} refuses flux1 files with modules beside the blocks, such as {strange[0]}: take them out"]
    return _prefix_problem(consumer, file, _DIFFUSERS_PREFIXES) if file.family in SD else []


def _wan_problem(consumer: Consumer, file: PlannedFile) -> list[str]:
    if strange := [name for name in file.modules if name.startswith(_WAN_FUN)]:
        found = f"modules such as {strange[0]}: names begin with lora_unet_blocks_"
    elif missing := missing_of_whole(file.modules):
        found = f"{missing[0]} missing ({len(missing)} modules): it takes every block whole, so train all of its linear layers"
    else:
        return []
    return [f"{consumer.title} refuses wan files with {found}"]


def _musubi_names(consumer: Consumer, file: PlannedFile) -> list[str]:
    """It looks for lora_unet_ and the name of the layer, and leaves everything else out with a warning."""
    strange = [name for name in file.modules if name.startswith(_WAN_FUN)]
    if strange:
        return [f"{consumer.title} leaves out modules such as {strange[0]}: it knows lora_unet_blocks_ with one underscore"]
    return []


def _invokeai_names(consumer: Consumer, file: PlannedFile) -> list[str]:
    """SDXL files have one of three prefixes; the model of an SD file is told from a few modules."""
    if file.layout not in LAYOUTS_WITH_ALPHA or file.family not in SD:
        return []
    if file.family == "sdxl":
        return _prefix_problem(consumer, file, _INVOKE_PREFIXES)
    if any(_INVOKE_SD_MARKS.search(name) for name in file.modules):
        return []
    return [f"{consumer.title} knows an SD LoRA by its attn2_to_k, attn2_to_v or text encoder modules: keep at least one of them"]


def _prefix_problem(consumer: Consumer, file: PlannedFile, prefixes: tuple[str, ...]) -> list[str]:
    strange = [name for name in file.modules if not name.startswith(prefixes)]
    if not strange:
        return []
    return [
        f"{consumer.title} refuses {file.family} files with modules such as {strange[0]}: names begin with {', '.join(prefixes)}"
    ]


_NAME_RULES = dict.fromkeys(("diffusers", "diffusers-0.40", "diffusers-0.32"), _diffusers_names) | {
    "invokeai": _invokeai_names,
    "musubi": _musubi_names,
}
