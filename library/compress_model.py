"""What the checkpoint is: its model type from its keys alone, and U-Net widths other than Stable Diffusion's own."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_compress import LoraCompressError
from lora_compress.files.header import read_header
from lora_compress.names.families import family_of
from lora_compress.update import ModuleShape

__all__ = ["adapt_sd_widths", "adapt_sdxl_widths", "checkpoint_shapes", "detect_model_type", "require_model"]

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]  # of a checkpoint's tensors, without prefixes

_PREFIXES = ("model.diffusion_model.", "net.")  # of a denoiser in a checkpoint
_PIPELINES = {"StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "StableDiffusion": "sd", "Flux": "flux", "Chroma": "chroma"}
_UNTRAINED = ("flux2", "qwen_image", "wan")
_FOLDERS = ("sd", "sdxl", "flux")  # that sd-scripts reads from a folder of diffusers


def _has(*beginnings: str, without: Iterable[str] = ()) -> Callable[[Shapes], bool]:
    """A rule: keys with each of the `beginnings`, none with one of `without`."""

    def rule(shapes: Shapes) -> bool:
        found = [any(key.startswith(beginning) for key in shapes) for beginning in beginnings]
        return all(found) and not any(key.startswith(tuple(without)) for key in shapes)

    return rule


# The first rule that applies is right. What `without` names belongs to relatives that sd-scripts does not train: FLUX.2, Z-Image.
_RULES: list[tuple[str, Callable[[Shapes], bool]]] = [
    ("sdxl", _has("conditioner.embedders.1.")),
    ("sd3", _has("joint_blocks.0.")),
    ("chroma", _has("double_blocks.0.img_attn.", "single_blocks.0.", "distilled_guidance_layer.")),
    ("flux", _has("double_blocks.0.img_attn.", "vector_in.", without=["double_stream_modulation"])),
    ("flux", _has("transformer_blocks.0.attn.add_k_proj.", "time_text_embed.text_embedder.", "single_transformer_blocks.0.")),
    ("hunyuan_image", lambda shapes: _has("double_blocks.0.img_attn_qkv.", "byt5_in.")(shapes) and _is_image(shapes)),
    ("anima", _has("blocks.0.self_attn.q_proj.", "llm_adapter.")),
    ("lumina", _has("cap_embedder.", "noise_refiner.0.attention.qkv.", without=["cap_pad_token"])),
    ("sd", _has("cond_stage_model.")),
    ("sd", _has("input_blocks.")),
]


def _is_image(shapes: Shapes) -> bool:
    """Patches of HunyuanImage are two-dimensional, those of HunyuanVideo have time."""
    return len(shapes.get("img_in.proj.weight", ())) == 4


def require_model(name: str | None) -> str:
    """`name` itself, if it is a file, a folder or can be a repository of the Hugging Face hub.

    Raises:
        LoraCompressError: it is missing.
    """
    if not name:
        raise LoraCompressError("pretrained_model_name_or_path: not set: name a checkpoint, a diffusers folder or a hub repository")
    if not os.path.exists(name) and not _can_be_hub_id(name):
        raise LoraCompressError(f"pretrained_model_name_or_path={name}: no such file or folder: check the path")
    return name


def detect_model_type(name: str) -> str:
    """The model type, from a checkpoint's keys or the model_index.json of a diffusers folder (or hub repository).

    Returns:
        sd, sdxl, sd3, flux, chroma, lumina, hunyuan_image or anima.

    Raises:
        LoraCompressError: it is none of them, is in a form that sd-scripts does not read, or cannot be read at all.
    """
    path = Path(name)
    if path.is_file():
        shapes = checkpoint_shapes(path)
        for kind, applies in _RULES:
            if applies(shapes):
                return kind
        family = _other_family(shapes)
        looks = f"it looks like {family}, which sd-scripts does not train" if family else "give --model_type"
        raise LoraCompressError(f"{name}: its keys are those of no model that sd-scripts trains: {looks}")
    pipeline = str((_model_index(path) if path.is_dir() else _hub_model_index(name)).get("_class_name"))
    kind = next((kind for beginning, kind in _PIPELINES.items() if pipeline.startswith(beginning)), "")
    if kind == "flux" and not path.is_dir():
        raise LoraCompressError(f"{name}: sd-scripts reads FLUX from a file or a folder on this machine: download it")
    if kind not in _FOLDERS:
        raise LoraCompressError(
            f"{name}: model_index.json names a {pipeline}: sd-scripts reads SD 1.x, 2.x, XL and FLUX from folders, "
            "other models from a single file: name the checkpoint"
        )
    return kind


def adapt_sd_widths(args: argparse.Namespace) -> None:
    """Let sd-scripts build the SD 1.x and 2.x U-Net at the widths of a diffusers folder; it has them as constants of its module.

    Does nothing for a checkpoint file or a folder without unet/config.json.

    Raises:
        LoraCompressError: the U-Net differs in more than its widths.
    """
    from library import original_unet

    folder = args.pretrained_model_name_or_path
    widths = _checked_widths(
        folder,
        {
            "down_block_types": original_unet.DOWN_BLOCK_TYPES,
            "up_block_types": original_unet.UP_BLOCK_TYPES,
            "layers_per_block": original_unet.LAYERS_PER_BLOCK,
        },
    )
    if widths and widths != list(original_unet.BLOCK_OUT_CHANNELS):
        original_unet.BLOCK_OUT_CHANNELS = tuple(widths)
        original_unet.TIMESTEP_INPUT_DIM = widths[0]
        original_unet.TIME_EMBED_DIM = widths[0] * 4
        logger.info("U-Net widths %s, from %s", widths, folder)


def adapt_sdxl_widths(args: argparse.Namespace) -> None:
    """The same for SDXL, whose second and third level are twice and four times as wide as the first.

    Raises:
        LoraCompressError: the U-Net differs in more than its widths, or they are in another proportion.
    """
    from library import sdxl_original_unet

    folder = args.pretrained_model_name_or_path
    widths = _checked_widths(
        folder,
        {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
        },
    )
    if not widths or widths[0] == sdxl_original_unet.MODEL_CHANNELS:
        return
    if widths != [widths[0], 2 * widths[0], 4 * widths[0]]:
        raise LoraCompressError(f"{folder}: U-Net widths {widths}: those of SDXL are in the proportion 1 : 2 : 4")
    sdxl_original_unet.MODEL_CHANNELS = widths[0]
    sdxl_original_unet.TIME_EMBED_DIM = widths[0] * 4
    logger.info("U-Net widths %s, from %s", widths, folder)


def _checked_widths(folder: str, expected: dict[str, Any]) -> list[int] | None:
    """block_out_channels of a diffusers folder, None where there is no such folder."""
    path = Path(folder) / "unet" / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    expected = expected | {"norm_num_groups": 32}
    differing = [f"{key} is {config[key]}, must be {value}" for key, value in expected.items() if config.get(key, value) != value]
    if differing:
        raise LoraCompressError(f"{path}: sd-scripts cannot build this U-Net: {'; '.join(differing)}")
    return config.get("block_out_channels")


def checkpoint_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a checkpoint by their keys, the prefix of a denoiser removed.

    Raises:
        LoraCompressError: it cannot be read.
    """
    try:
        if path.suffix in (".safetensors", ".sft"):
            shapes = {key: tensor.shape for key, tensor in read_header(path).tensors.items()}
        else:
            import torch

            loaded = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            shapes = {key: tuple(getattr(value, "shape", ())) for key, value in loaded.get("state_dict", loaded).items()}
    except Exception as error:
        raise LoraCompressError(f"{path}: not a checkpoint that can be read ({error})") from error
    for prefix in _PREFIXES:
        shapes = {key.removeprefix(prefix): shape for key, shape in shapes.items()}
    return shapes


def _other_family(shapes: Shapes) -> str:
    """A family that sd-scripts does not train, by the names and sizes of the denoiser's layers; "" if it is none that is known."""
    layers = {
        key.removesuffix(".weight"): ModuleShape(shape[0], shape[1], shape[2:], 1)
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) > 1
    }
    family = family_of(layers)
    return family if family in _UNTRAINED else ""


def _model_index(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraCompressError(f"{folder}: no diffusers model: its model_index.json cannot be read ({error})") from error


def _hub_model_index(name: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        return _model_index(Path(hf_hub_download(name, "model_index.json")).parent)
    except LoraCompressError:
        raise
    except Exception as error:
        raise LoraCompressError(f"{name}: no such file or folder, and not to be had from the Hugging Face hub ({error})") from error


def _can_be_hub_id(name: str) -> bool:
    suffixes = (".safetensors", ".ckpt", ".pt", ".bin")
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(suffixes)
