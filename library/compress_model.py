"""What the checkpoint is: its model type from its keys alone, and U-Net widths other than Stable Diffusion's own."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from lora_compress import LoraCompressError

__all__ = ["adapt_sd_widths", "adapt_sdxl_widths", "detect_model_type", "require_model"]

logger = logging.getLogger(__name__)

_SDXL_KEY = "conditioner.embedders.1."
_SD_KEYS = ("cond_stage_model.", "model.diffusion_model.")


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
    """sd or sdxl, from a checkpoint's keys or a diffusers folder's (or hub repository's) model_index.json.

    Raises:
        LoraCompressError: it is neither, or cannot be read.
    """
    path = Path(name)
    if path.is_file():
        keys = _checkpoint_keys(path)
        if any(key.startswith(_SDXL_KEY) for key in keys):
            return "sdxl"
        if any(key.startswith(_SD_KEYS) for key in keys):
            return "sd"
        raise LoraCompressError(f"{name}: its keys are those of neither SD nor SDXL: give --model_type")
    index = _model_index(path) if path.is_dir() else _hub_model_index(name)
    pipeline = str(index.get("_class_name"))
    if "StableDiffusionXL" in pipeline:
        return "sdxl"
    if pipeline.startswith("StableDiffusion") and "3" not in pipeline:
        return "sd"
    raise LoraCompressError(f"{name}: model_index.json names a {pipeline}, supported are Stable Diffusion 1.x, 2.x and XL")


def adapt_sd_widths(folder: str) -> None:
    """Let sd-scripts build the SD 1.x and 2.x U-Net at the widths of a diffusers folder; it has them as constants of its module.

    Does nothing for a checkpoint file or a folder without unet/config.json.

    Raises:
        LoraCompressError: the U-Net differs in more than its widths.
    """
    from library import original_unet

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


def adapt_sdxl_widths(folder: str) -> None:
    """The same for SDXL, whose second and third level are twice and four times as wide as the first.

    Raises:
        LoraCompressError: the U-Net differs in more than its widths, or they are in another proportion.
    """
    from library import sdxl_original_unet

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


def _checkpoint_keys(path: Path) -> list[str]:
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        import torch

        loaded = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        return list(loaded.get("state_dict", loaded))
    except Exception as error:
        raise LoraCompressError(f"{path}: not a checkpoint that can be read ({error})") from error


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
