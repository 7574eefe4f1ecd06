"""Folders with narrow pipelines of diffusers, random weights, text encoders and tokenizers included, for trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TINY_SD = Path(__file__).resolve().parents[2] / "assets" / "tiny-sd"
_WIDTH = 32


def sdxl(folder: Path) -> Path:
    """Of SDXL's kind."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=2 * _WIDTH,
        attention_head_dim=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + _WIDTH,
    )
    pipe = StableDiffusionXLPipeline(unet=unet, vae=_vae(4), scheduler=EulerDiscreteScheduler(), **_texts(True, t5=""))
    pipe.save_pretrained(folder)
    return folder


def sd3(folder: Path) -> Path:
    """Of Stable Diffusion 3's kind."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * _WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * _WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=_vae(4, shift_factor=0.1), scheduler=scheduler, **_texts(True, t5="_3", width=2 * _WIDTH)
    )
    pipe.save_pretrained(folder)
    return folder


def flux(folder: Path) -> Path:
    """Of FLUX's kind, distilled for a guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        axes_dims_rope=(4, 14, 14),
        guidance_embeds=True,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(transformer=transformer, vae=_vae(4, shift_factor=0.1), scheduler=scheduler, **_texts(False, t5="_2"))
    pipe.save_pretrained(folder)
    return folder


def _vae(channels: int, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=8,
        **more,
    )


def _texts(two: bool, *, t5: str, width: int = _WIDTH) -> dict[str, Any]:
    """Text encoders and tokenizers by component: one or two of CLIP, and T5 under the ending `t5`, which reads as CLIP does."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": _WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    text = CLIPTextConfig(**sizes, num_attention_heads=2, projection_dim=_WIDTH, max_position_embeddings=tokenizer.model_max_length)
    first = CLIPTextModelWithProjection if t5 == "_3" else CLIPTextModel
    found: dict[str, Any] = {"text_encoder": first(text), "tokenizer": tokenizer}
    if two:
        found |= {"text_encoder_2": CLIPTextModelWithProjection(text), "tokenizer_2": tokenizer}
    if t5:
        model = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
        found |= {f"text_encoder{t5}": model, f"tokenizer{t5}": tokenizer}
    return found
