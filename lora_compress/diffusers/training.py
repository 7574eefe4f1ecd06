"""Trains a LoRA of a Stable Diffusion 1.x pipeline with diffusers and PEFT alone, pruned and quantized as settings say."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraCompressError, SettingsError
from ..evaluation.pictures import PICTURE_ENDINGS
from ..pipeline import save
from ..settings import CompressionSettings
from ..training import Pair, TrainingSession, find_pairs

__all__ = ["train"]

logger = logging.getLogger(__name__)

_DEFAULTS: dict[str, Any] = {
    "pretrained_model_name_or_path": None,
    "train_data_dir": None,
    "caption_extension": ".txt",
    "resolution": "512,512",
    "train_batch_size": 1,
    "max_train_steps": 1600,
    "network_dim": 4,
    "network_alpha": 1.0,
    "unet_lr": 1e-4,
    "text_encoder_lr": 1e-5,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "seed": 0,
    "output_dir": None,
    "output_name": "last",
}
_UNET = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
_TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def train(config: Mapping[str, Any]) -> Path:
    """Train as a TOML of kohya's keys says, on one process in float32, and write the LoRA; its path.

    Loss: mean squared error of the noise, or of the velocity where the scheduler predicts that (arXiv 2006.11239, 2202.00512).

    Raises:
        LoraCompressError: no data, another family than Stable Diffusion 1.x, wrong settings, PEFT or diffusers missing.
    """
    try:
        from diffusers import DDPMScheduler, StableDiffusionPipeline
        from diffusers.optimization import get_scheduler
        from peft import LoraConfig
    except ImportError as error:
        raise LoraCompressError(f"--host diffusers needs diffusers and peft ({error}): pip install diffusers peft") from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LoraCompressError("--host diffusers trains in one process: start it with --num_processes 1")
    options, settings = _read(config)
    torch.manual_seed(int(options["seed"]))
    model = str(options["pretrained_model_name_or_path"])
    if not (Path(model) / "model_index.json").is_file():
        raise LoraCompressError(f"{model}: has no model_index.json: --host diffusers takes a folder that diffusers has saved")
    if (kind := StableDiffusionPipeline.load_config(model).get("_class_name")) != "StableDiffusionPipeline":
        raise LoraCompressError(f"{model}: is a {kind}: --host diffusers trains a StableDiffusionPipeline (SD 1.x) only")
    pairs_of_files = _find_pictures(options)
    pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    groups: list[dict[str, Any]] = []
    pairs: dict[str, Pair] = {}
    for module, prefix, targets, rate in (
        (pipe.unet, "lora_unet", _UNET, float(options["unet_lr"])),
        (pipe.text_encoder, "lora_te", _TEXT, float(options["text_encoder_lr"])),
    ):
        module.requires_grad_(False)
        if rate:
            rank, alpha = int(options["network_dim"]), float(options["network_alpha"])
            module.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))  # type: ignore[arg-type]
            found = _kohya_names(find_pairs(module), prefix)
            groups.append({"params": [weight for pair in found.values() for weight in pair.weights], "lr": rate})
            pairs |= found
        module.train()
    pipe.vae.requires_grad_(False)
    steps = int(options["max_train_steps"])
    session = TrainingSession(pairs, settings, total_steps=steps)
    optimizer = torch.optim.AdamW(groups)
    rates = get_scheduler(
        options["lr_scheduler"], optimizer, num_warmup_steps=int(options["lr_warmup_steps"]), num_training_steps=steps
    )
    pictures = [(_encode(pipe, path, options), caption) for path, caption in pairs_of_files]
    order: list[int] = []
    for step in range(steps):
        while len(order) < int(options["train_batch_size"]):
            order += torch.randperm(len(pictures)).tolist()
        chosen = [pictures[order.pop(0)] for _ in range(int(options["train_batch_size"]))]
        loss = _loss(pipe, scheduler, torch.cat([latents for latents, _ in chosen]), [caption for _, caption in chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight for pair in pairs.values() for weight in pair.weights], 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            logger.info("step %d of %d: loss %.4f", step + 1, steps, loss.item())
    path = Path(options["output_dir"]) / f"{options['output_name']}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(session.compress(torch.float16), path)
    session.close()
    return path


def _read(config: Mapping[str, Any]) -> tuple[dict[str, Any], CompressionSettings]:
    """Options of the trainer and settings of the compression; keys of neither are named in one warning."""
    own: dict[str, Any] = {}
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("pruning", "quantization"):
            section = dict(value)
            own |= section if section.pop("enabled", True) else {}
        else:
            flat |= value if isinstance(value, Mapping) else {name: value}
    if unknown := sorted(set(flat) - set(_DEFAULTS)):
        logger.warning("--host diffusers does not know and leaves out: %s", ", ".join(unknown))
    options = {name: flat.get(name, default) for name, default in _DEFAULTS.items()}
    if missing := [name for name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir") if not options[name]]:
        raise SettingsError([f"{name} is missing: set it" for name in missing], "--host diffusers")
    return options, CompressionSettings.parse(own)


def _find_pictures(options: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """Pictures with captions in folders <repeats>_<name>, each as often as its folder says."""
    found = []
    for folder in sorted(Path(options["train_data_dir"]).glob("[0-9]*_*")):
        repeats = int(folder.name.partition("_")[0])
        for path in sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_ENDINGS):
            caption = path.with_suffix(options["caption_extension"])
            if not caption.is_file():
                raise LoraCompressError(f"{path}: has no caption {caption.name} beside it: write one, or set caption_extension")
            found += [(path, caption.read_text(encoding="utf-8").strip())] * repeats
    if not found:
        raise LoraCompressError(f"{options['train_data_dir']}: no pictures in folders <repeats>_<name>: set train_data_dir")
    return found


def _kohya_names(pairs: Mapping[str, Pair], prefix: str) -> dict[str, Pair]:
    named = {name: f"{prefix}_{name.replace('.', '_')}" for name in pairs}
    return {named[name]: replace(pair, name=named[name], module=named[name]) for name, pair in pairs.items()}


@torch.no_grad()
def _encode(pipe: Any, path: Path, options: Mapping[str, Any]) -> Tensor:
    from PIL import Image

    size = [int(part) for part in str(options["resolution"]).split(",")]
    with Image.open(path) as picture:
        pixels = pipe.image_processor.preprocess(picture.convert("RGB"), height=size[-1], width=size[0])
    return pipe.vae.encode(pixels.to(pipe.device)).latent_dist.sample() * pipe.vae.config.scaling_factor


def _loss(pipe: Any, scheduler: Any, latents: Tensor, captions: list[str]) -> Tensor:
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = pipe.text_encoder(tokens.to(latents.device))[0]
    noise = torch.randn_like(latents)
    times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    predicted = pipe.unet(scheduler.add_noise(latents, noise, times), times, states).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    return torch.nn.functional.mse_loss(predicted, scheduler.get_velocity(latents, noise, times) if velocity else noise)
