"""Small pipelines of diffusers, LoRA for all kinds of their layers, and what they put out with an update added by arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from core.factories import dense, random_update
from torch import Tensor, nn

from lora_compress import LowRankUpdate

__all__ = ["added", "flux", "flux_output", "linear_updates", "sd_output", "sdxl", "tiny_sd"]

TINY_SD = Path(__file__).resolve().parents[2] / "assets" / "tiny-sd"
_COMPONENTS = {"lora_unet_": ("unet", "transformer"), "lora_te_": ("text_encoder",)}


def tiny_sd() -> Any:
    """A pipeline of assets/tiny-sd, float32; read once, and a copy at every call."""
    read = _read()
    copies = {name: copy.deepcopy(part) for name, part in read.components.items() if isinstance(part, nn.Module)}
    return type(read)(**{**read.components, **copies}, requires_safety_checker=False)


@cache
def _read() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(str(TINY_SD), safety_checker=None, torch_dtype=torch.float32)


def flux() -> Any:
    """A narrow FLUX pipeline with random weights, the same at every call."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 14, 14),
    )
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **absent)


def sdxl() -> Any:
    """A pipeline with a narrow U-Net of SDXL's topology and random weights, the same at every call."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        use_linear_projection=True,
    )
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    return StableDiffusionXLPipeline(unet=unet, vae=vae, scheduler=EulerDiscreteScheduler(), **absent)


def sd_output(pipe: Any) -> Tensor:
    """One step of the U-Net on fixed noise and words, by way of the text encoder."""
    latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        text = pipe.text_encoder(torch.arange(8).unsqueeze(0))[0]
        return pipe.unet(latents, 10, encoder_hidden_states=text).sample


def flux_output(pipe: Any) -> Tensor:
    """One step of the transformer on fixed noise."""
    generator = torch.Generator().manual_seed(5)
    hidden, text, pooled = (torch.randn(1, *shape, generator=generator) for shape in ((4, 16), (6, 32), (32,)))
    with torch.no_grad():
        return pipe.transformer(
            hidden_states=hidden,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.tensor([0.5]),
            img_ids=torch.arange(12).float().reshape(4, 3) % 2,
            txt_ids=torch.zeros(6, 3),
            guidance=None,
            return_dict=False,
        )[0]


def layers(pipe: Any) -> dict[str, nn.Module]:
    """Linear layers by kohya's names, in the way of diffusers."""
    found = {}
    for prefix, components in _COMPONENTS.items():
        for component in components:
            model = getattr(pipe, component, None)
            for name, layer in model.named_modules() if model is not None else ():
                if isinstance(layer, nn.Linear):
                    found[prefix + name.replace(".", "_")] = layer
    return found


def linear_updates(pipe: Any, seed: int = 0, every: int = 5, magnitude: float = 0.05) -> dict[str, LowRankUpdate]:
    """Ranks 2 to 6 and alphas that differ, over some of the linear layers."""
    updates = {}
    for number, (name, layer) in enumerate(list(layers(pipe).items())[::every]):
        out, inputs = layer.weight.shape  # type: ignore[union-attr]
        updates[name] = random_update(2 + number % 5, inputs, out, (), 0.5 + number % 4, seed + number, magnitude)
    return updates


def added(pipe: Any, updates: Mapping[str, LowRankUpdate], output: Callable[[], Tensor], strength: float = 1.0) -> Tensor:
    """What `output` gives with updates added to the weights of a pipeline without adapters, which is itself again afterwards."""
    before: dict[nn.Parameter, Tensor] = {}
    for name, layer in layers(pipe).items():
        if name in updates:
            weight: Any = layer.weight
            before[weight] = weight.data
            weight.data = weight.data + strength * dense(updates[name]).float().reshape(weight.shape)
    assert len(before) == len(updates)
    try:
        return output()
    finally:
        for weight, data in before.items():
            weight.data = data
