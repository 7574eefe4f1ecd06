"""Writes the trained parts as a StableDiffusionPipeline folder in fp16, and the probe beside them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from lora_compress.evaluation.probe import Probe

from .tokenizer import CACHE_NAME

__all__ = ["save_pipeline", "save_probe"]


def save_probe(probe: Probe, folder: Path) -> None:
    """Write probe.safetensors, floats as fp16, under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in probe.state_dict().items()}
    save_file(state, folder / "probe.part", metadata={"format": "pt"})
    os.replace(folder / "probe.part", folder / "probe.safetensors")


def save_pipeline(
    folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> int:
    """Write the model folder; returns the bytes of everything in it."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_cache" / CACHE_NAME, dirs_exist_ok=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
