"""The diffusers pipeline that a LoRA is judged with: load it, draw with it, know its family."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EvaluationError

__all__ = ["Pipeline", "denoiser_of", "draw", "family_of_pipeline", "load_base_model", "text_encoders_of"]

Pipeline = Any  # diffusers' pipelines share no interface that types could tell
Progress = Callable[[int, int], None]

_CLASSES = {  # of a single file, by the family of the LoRA
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux1": "FluxPipeline",
}
_FAMILIES = {name: family for family, name in _CLASSES.items() if name != "StableDiffusionPipeline"}
_SD_WIDTHS = {768: "sd1", 1024: "sd2"}


def load_base_model(
    path: str | os.PathLike[str], *, family: str = "unknown", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Pipeline:
    """A pipeline that draws pictures from text.

    Args:
        path: a diffusers folder, a name on the Hugging Face hub, or a checkpoint in one file.
        family: of the LoRA; a single file is opened as a model of that family.
        device: where it runs.
        dtype: of its weights.

    Raises:
        EvaluationError: there is no such model, or it cannot be loaded.
    """
    try:
        import diffusers
    except ImportError as error:
        raise EvaluationError(f"diffusers is missing ({error}): pip install diffusers transformers peft") from error
    text = str(path)
    diffusers.utils.logging.disable_progress_bar()  # of loading five parts; drawing has one of its own
    try:
        if Path(path).is_file():
            if family not in _CLASSES:
                raise EvaluationError(f"{path}: is one file, and the family of the LoRA is {family}: give a diffusers folder")
            pipeline = getattr(diffusers, _CLASSES[family]).from_single_file(text, torch_dtype=dtype)
        else:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(text, torch_dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EvaluationError(
            f"{path}: cannot be loaded as a base model ({reason}): give a diffusers folder, the one with model_index.json, "
            "a checkpoint, or a name on the Hugging Face hub"
        ) from error
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it would replace pictures by black ones
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def denoiser_of(pipeline: Pipeline) -> torch.nn.Module:
    """The U-Net or transformer."""
    found = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if found is None:
        raise EvaluationError(f"{type(pipeline).__name__}: has neither a U-Net nor a transformer: give a text-to-image model")
    return found


def text_encoders_of(pipeline: Pipeline) -> dict[str, torch.nn.Module]:
    """text_encoder, text_encoder_2, ... by name, those that are there."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return {name: model for name in names if (model := getattr(pipeline, name, None)) is not None}


def family_of_pipeline(pipeline: Pipeline) -> str:
    """The family as `layouts.families.family_of` calls it; unknown where the class does not tell."""
    name = type(pipeline).__name__
    if name == "StableDiffusionPipeline":
        return _SD_WIDTHS.get(getattr(pipeline.unet.config, "cross_attention_dim", 0), "sd1")
    return _FAMILIES.get(name, "unknown")


@torch.no_grad()
def draw(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float | None = None,
    resolution: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
    output_type: str = "pt",
) -> Tensor:
    """A picture for each prompt, uint8 (N, 3, H, W); each depends on its prompt and seed alone, whatever the batch.

    Args:
        pipeline: from `load_base_model`.
        prompts: N texts.
        seeds: of the noise, drawn on the CPU, so that every device starts from the same.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; None for the pipeline's own.
        resolution: width and height; None for the pipeline's own.
        batch: prompts at a time.
        progress: called with (pictures drawn, pictures in all).
        output_type: pt; latent leaves the decoder out and returns latents as they are.
    """
    options: dict[str, Any] = {"num_inference_steps": steps, "output_type": output_type}
    if guidance is not None:
        options["guidance_scale"] = guidance
    if resolution is not None:
        options |= {"height": resolution, "width": resolution}
    pictures = []
    for begin in range(0, len(prompts), batch):
        noise = [torch.Generator().manual_seed(seed) for seed in seeds[begin : begin + batch]]
        found = getattr(pipeline(list(prompts[begin : begin + batch]), generator=noise, **options), "images", None)
        if found is None:
            raise EvaluationError(f"{type(pipeline).__name__}: draws no pictures: give a text-to-image model")
        pictures.append(found if output_type == "latent" else found.float().mul(255).round().clamp(0, 255).byte().cpu())
        if progress:
            progress(min(begin + batch, len(prompts)), len(prompts))
    return torch.cat(pictures)
