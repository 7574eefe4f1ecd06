"""Stable Diffusion 1.x models with random weights, made on the spot: full size, or narrow enough to train in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TINY_SD = ROOT / "assets" / "tiny-sd"
TOKENIZER_CACHE = TINY_SD / "tokenizer_cache"

_FULL = {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "text": (768, 3072, 12, 12), "vocabulary": 49408}
_NARROW = {"unet": (32, 32, 64, 64), "vae": (32, 32, 32, 32), "text": (32, 64, 2, 4), "vocabulary": 1024}


def write_random_sd(folder: Path, *, full: bool = False, seed: int = 0) -> Path:
    """A diffusers folder of SD1.x's topology, fp16, tokenizer of tiny-sd: 1 GB of U-Net at full size, 3 MB otherwise."""
    import networks.sd_scripts_path  # noqa: F401  also lets torchvision import beside a CPU-only torch

    # isort: split
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    sizes = _FULL if full else _NARROW
    hidden, feed_forward, layers, heads = sizes["text"]
    tokenizer = CLIPTokenizer.from_pretrained(str(TINY_SD / "tokenizer"))
    text_config = CLIPTextConfig(
        vocab_size=max(sizes["vocabulary"], len(tokenizer)),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=hidden,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):
        text_encoder = CLIPTextModel(text_config)
        vae = AutoencoderKL(
            block_out_channels=sizes["vae"],
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=32,
        )
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=sizes["unet"], cross_attention_dim=hidden, attention_head_dim=8, norm_num_groups=32
        )
    generator = torch.Generator().manual_seed(seed)
    for model in (text_encoder, vae, unet):
        _fill(model, generator)
    text_encoder.text_model.embeddings.position_ids = torch.arange(77).unsqueeze(0)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    return folder


def _fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Normal weights of the usual size for each layer, norms as the identity; fp16."""
    model.to_empty(device="cpu").half()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)


def remove(folder: Path) -> None:
    """Give the disk space of a full-size model back."""
    shutil.rmtree(folder, ignore_errors=True)
