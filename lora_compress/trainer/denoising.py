"""The models that the trainer knows: which layers learn, what captions become, how far the denoiser is from what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import LoraCompressError

__all__ = ["Denoiser", "load_denoiser"]

_UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_TRANSFORMER = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
)
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

Told = tuple[Tensor, ...]  # what the denoiser is told of captions, (N, ...) each


class Denoiser:
    """A pipeline of Stable Diffusion 1.x or 2.x to train on.

    Args:
        pipe: of diffusers.
        size: width and height of the pictures.

    Attributes:
        texts_learn: whether a text encoder learns; otherwise each caption is read once.
    """

    prefix, component = "lora_unet", "unet"
    targets: tuple[str, ...] = _UNET
    encoders: ClassVar[dict[str, str]] = {"lora_te": "text_encoder"}  # that learn, by kohya's prefix

    def __init__(self, pipe: Any, size: tuple[int, int]) -> None:
        self.pipe, self.size = pipe, size
        self.texts_learn = True
        self._known: dict[str, Told] = {}

    @property
    def parts(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Components whose layers learn, and the names of these, by kohya's prefix."""
        return {self.prefix: (self.component, self.targets)} | {prefix: (name, _TEXT) for prefix, name in self.encoders.items()}

    @property
    def models(self) -> dict[str, Any]:
        """All models of the pipeline by the name of their component."""
        return {name: model for name, model in self.pipe.components.items() if isinstance(model, torch.nn.Module)}

    @torch.no_grad()
    def encode(self, path: Path) -> Tensor:
        """The latents of a picture, (1, c, h, w)."""
        from PIL import Image

        width, height = self.size
        with Image.open(path) as picture:
            pixels = self.pipe.image_processor.preprocess(picture.convert("RGB"), height=height, width=width)
        vae = self.pipe.vae
        latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample().float()
        return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    def read(self, captions: Sequence[str]) -> Told:
        """What the text encoders make of captions."""
        if self.texts_learn:
            return self._read(list(captions))
        with torch.no_grad():
            self._known |= {text: self._read([text]) for text in dict.fromkeys(captions) if text not in self._known}
        return tuple(torch.cat(parts) for parts in zip(*(self._known[text] for text in captions), strict=True))

    def loss(self, latents: Tensor, captions: Sequence[str]) -> Tensor:
        """Mean squared error of the noise, or of the velocity where the scheduler predicts that (arXiv 2006.11239, 2202.00512).

        Args:
            latents: (N, c, h, w).
            captions: N.
        """
        scheduler, told = self._noising, self.read(captions)
        noise = torch.randn_like(latents)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        predicted = self._predict(scheduler.add_noise(latents, noise, times), times, told)
        wanted = scheduler.get_velocity(latents, noise, times) if scheduler.config.prediction_type == "v_prediction" else noise
        return torch.nn.functional.mse_loss(predicted.float(), wanted)

    @cached_property
    def _noising(self) -> Any:
        """What adds noise: the pipeline's own scheduler may know only how to take it away."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    def _read(self, captions: list[str]) -> Told:
        return self._encoded(captions, do_classifier_free_guidance=False)[:1]

    def _encoded(self, captions: list[str], **more: Any) -> Any:
        return self.pipe.encode_prompt(captions, device=self.pipe.device, num_images_per_prompt=1, **more)

    def _predict(self, noisy: Tensor, times: Tensor, told: Told) -> Tensor:
        found: Tensor = self.pipe.unet(noisy, times, told[0]).sample
        return found


class _SDXL(Denoiser):
    encoders: ClassVar[dict[str, str]] = {"lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}

    def _read(self, captions: list[str]) -> Told:
        found = self._encoded(captions, do_classifier_free_guidance=False)
        return found[0], found[2]

    def _predict(self, noisy: Tensor, times: Tensor, told: Told) -> Tensor:
        """The U-Net is also told the size, and that nothing was cropped."""
        width, height = self.size
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=noisy.device, dtype=told[1].dtype)
        more = {"text_embeds": told[1], "time_ids": sizes.repeat(len(noisy), 1)}
        found: Tensor = self.pipe.unet(noisy, times, told[0], added_cond_kwargs=more).sample
        return found


class _SD3(Denoiser):
    """Rectified flow (arXiv 2403.03206): the transformer tells the way from the latents to the noise."""

    prefix, component, targets = "lora_transformer", "transformer", _TRANSFORMER
    encoders: ClassVar[dict[str, str]] = {"lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}

    def loss(self, latents: Tensor, captions: Sequence[str]) -> Tensor:
        """Mean squared error of the velocity, at times of a logit-normal distribution shifted as the scheduler's are."""
        told = self.read(captions)
        noise = torch.randn_like(latents)
        times = torch.sigmoid(torch.randn(len(latents), device=latents.device))
        config = self.pipe.scheduler.config
        shift = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))
        times = shift * times / (1 + (shift - 1) * times)
        part = times.view(-1, 1, 1, 1)
        predicted = self._predict((1 - part) * latents + part * noise, times, told)
        return torch.nn.functional.mse_loss(predicted.float(), noise - latents)

    def _read(self, captions: list[str]) -> Told:
        found = self._encoded(captions, prompt_2=captions, prompt_3=captions, do_classifier_free_guidance=False)
        return found[0], found[2]

    def _predict(self, noisy: Tensor, times: Tensor, told: Told) -> Tensor:
        steps = times * self.pipe.scheduler.config.num_train_timesteps
        found: Tensor = self.pipe.transformer(noisy, told[0], told[1], steps).sample
        return found


class _Flux(_SD3):
    encoders: ClassVar[dict[str, str]] = {"lora_te1": "text_encoder"}

    def _read(self, captions: list[str]) -> Told:
        found = self._encoded(captions, prompt_2=captions)
        return found[0], found[1]

    def _predict(self, noisy: Tensor, times: Tensor, told: Told) -> Tensor:
        """The transformer sees squares of four latents each, and is told a guidance of 1 where it was distilled for one."""
        pipe, (count, channels, height, width) = self.pipe, noisy.shape
        guidance = torch.ones(count, device=noisy.device) if pipe.transformer.config.guidance_embeds else None
        kind: dict[str, Any] = {"device": noisy.device, "dtype": told[0].dtype}
        found = pipe.transformer(
            hidden_states=pipe._pack_latents(noisy, count, channels, height, width),
            encoder_hidden_states=told[0],
            pooled_projections=told[1],
            timestep=times,
            guidance=guidance,
            img_ids=pipe._prepare_latent_image_ids(count, height // 2, width // 2, **kind),
            txt_ids=torch.zeros(told[0].shape[1], 3, **kind),
        ).sample
        return pipe._unpack_latents(found, height * pipe.vae_scale_factor, width * pipe.vae_scale_factor, pipe.vae_scale_factor)  # type: ignore[no-any-return]


_KINDS = {
    "StableDiffusionPipeline": Denoiser,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _Flux,
}


def load_denoiser(model: str, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Denoiser:
    """Load a folder of diffusers, with its weights in `dtype`; the VAE in float32.

    Raises:
        LoraCompressError: it is none, or of a family that is not trained here.
    """
    import diffusers

    if not (Path(model) / "model_index.json").is_file():
        raise LoraCompressError(f"{model}: has no model_index.json: --host diffusers takes a folder that diffusers has saved")
    kind = diffusers.DiffusionPipeline.load_config(model).get("_class_name")
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise LoraCompressError(f"{model}: is a {kind}: --host diffusers trains {known}; sd-scripts trains the others")
    more = {"safety_checker": None} if kind == "StableDiffusionPipeline" else {}
    pipe = getattr(diffusers, kind).from_pretrained(model, torch_dtype=dtype, **more)
    pipe.vae.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return _KINDS[kind](pipe, size)
