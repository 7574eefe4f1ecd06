"""The models that the trainer knows: which layers learn, what their captions become, how far the denoiser is from the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraCompressError

__all__ = ["Denoiser", "load_denoiser"]

_UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_ENCODERS = {  # text encoders by what kohya calls them
    "StableDiffusionPipeline": {"lora_te": "text_encoder"},
    "StableDiffusionXLPipeline": {"lora_te1": "text_encoder", "lora_te2": "text_encoder_2"},
}


@dataclass(frozen=True)
class Denoiser:
    """A pipeline of Stable Diffusion 1.x, 2.x or XL to train on.

    Args:
        pipe: of diffusers.
        scheduler: that adds noise.
        size: width and height of the pictures.
    """

    pipe: Any
    scheduler: Any
    size: tuple[int, int]

    @property
    def parts(self) -> dict[str, tuple[torch.nn.Module, Sequence[str]]]:
        """Models whose layers learn, and the names of these, by kohya's prefix."""
        encoders = _ENCODERS[type(self.pipe).__name__]
        return {"lora_unet": (self.pipe.unet, _UNET)} | {
            prefix: (getattr(self.pipe, name), _TEXT) for prefix, name in encoders.items()
        }

    @torch.no_grad()
    def encode(self, path: Path) -> Tensor:
        """The latents of a picture, (1, c, h, w)."""
        from PIL import Image

        width, height = self.size
        with Image.open(path) as picture:
            pixels = self.pipe.image_processor.preprocess(picture.convert("RGB"), height=height, width=width)
        vae = self.pipe.vae
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample().float() * vae.config.scaling_factor

    def loss(self, latents: Tensor, captions: list[str]) -> Tensor:
        """Mean squared error of the noise, or of the velocity where the scheduler predicts that (arXiv 2006.11239, 2202.00512).

        Args:
            latents: (N, c, h, w).
            captions: N.
        """
        states, more = self._read(captions, latents.device)
        noise = torch.randn_like(latents)
        times = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, times)
        predicted = self.pipe.unet(noisy, times, states, added_cond_kwargs=more).sample
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        wanted = self.scheduler.get_velocity(latents, noise, times) if velocity else noise
        return torch.nn.functional.mse_loss(predicted.float(), wanted)

    def _read(self, captions: list[str], device: torch.device) -> tuple[Tensor, Mapping[str, Tensor] | None]:
        """What the text encoders make of captions, and what else the U-Net of SDXL is told: the size, nothing cropped."""
        found = self.pipe.encode_prompt(captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        if len(_ENCODERS[type(self.pipe).__name__]) == 1:
            return found[0], None
        width, height = self.size
        times = torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=found[0].dtype)
        return found[0], {"text_embeds": found[2], "time_ids": times.repeat(len(captions), 1)}


def load_denoiser(model: str, size: tuple[int, int]) -> Denoiser:
    """Load a folder of diffusers, in float32.

    Raises:
        LoraCompressError: it is none, or of a family that is not trained here.
    """
    import diffusers

    if not (Path(model) / "model_index.json").is_file():
        raise LoraCompressError(f"{model}: has no model_index.json: --host diffusers takes a folder that diffusers has saved")
    kind = diffusers.DiffusionPipeline.load_config(model).get("_class_name")
    if kind not in _ENCODERS:
        known = ", ".join(_ENCODERS)
        raise LoraCompressError(f"{model}: is a {kind}: --host diffusers trains {known}; sd-scripts trains the others")
    more = {"safety_checker": None} if kind == "StableDiffusionPipeline" else {}
    pipe = getattr(diffusers, kind).from_pretrained(model, torch_dtype=torch.float32, **more)
    return Denoiser(pipe, diffusers.DDPMScheduler.from_config(pipe.scheduler.config), size)
