"""Stable Diffusion models with random weights, made on the spot: full size, or narrow enough to train in seconds."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TINY_SD = ROOT / "assets" / "tiny-sd"
TOKENIZER_CACHE = TINY_SD / "tokenizer_cache"

_FULL = {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "text": (768, 3072, 12, 12), "vocabulary": 49408}
_NARROW = {"unet": (32, 32, 64, 64), "vae": (32, 32, 32, 32), "text": (32, 64, 2, 4), "vocabulary": 1024}
_SDXL_TEXT = ((768, 64, 12, 12), (1280, 64, 2, 20))  # sd-scripts reads layer 11 of the first; the widths make up its 2048


def write_random_sd(folder: Path, *, full: bool = False, seed: int = 0) -> Path:
    """A diffusers folder of SD1.x's topology, fp16, tokenizer of tiny-sd: 2 GB at full size, 6 MB otherwise."""
    import networks.sd_scripts_path  # noqa: F401  also lets torchvision import beside a CPU-only torch

    # isort: split
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    sizes: dict[str, Any] = _FULL if full else _NARROW
    with torch.device("meta"):
        text_encoder = CLIPTextModel(_text_config(sizes["text"], sizes["vocabulary"]))
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=sizes["unet"], cross_attention_dim=sizes["text"][0], attention_head_dim=8
        )
    models = {"text_encoder": text_encoder, "unet": unet, "vae": _vae(sizes["vae"])}
    _fill(models, seed)
    pipeline = StableDiffusionPipeline(
        **models,
        tokenizer=_tokenizer(),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    return folder


def write_random_sdxl(folder: Path, *, seed: int = 0) -> Path:
    """A diffusers folder of SDXL's topology, 64 channels wide; its tokenizer cache lies inside, in tokenizer_cache."""
    import networks.sd_scripts_path  # noqa: F401

    # isort: split
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        text_encoder = CLIPTextModel(_text_config(_SDXL_TEXT[0], 1024))
        text_encoder_2 = CLIPTextModelWithProjection(_text_config(_SDXL_TEXT[1], 1024))
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(64, 128, 256),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(1, 2, 4),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    models = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "unet": unet, "vae": _vae((32, 32, 32, 32))}
    _fill(models, seed)
    tokenizer = _tokenizer()
    pipeline = StableDiffusionXLPipeline(**models, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=_scheduler())
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    for name in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        shutil.copytree(TINY_SD / "tokenizer", folder / "tokenizer_cache" / name)
    return folder


def write_random_flux(folder: Path, *, seed: int = 0) -> dict[str, str]:
    """The four files of a FLUX.1 model, 64 channels wide and two blocks deep, and a tokenizer cache: options of its trainer."""
    import networks.sd_scripts_path  # noqa: F401

    # isort: split
    from safetensors.torch import save_file
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    from library import flux_models

    sizes = {"hidden_size": 64, "num_heads": 2, "axes_dim": [4, 14, 14], "depth": 2, "depth_single_blocks": 2}
    with torch.device("meta"):
        models: dict[str, Any] = {
            "pretrained_model_name_or_path": flux_models.Flux(
                flux_models.FluxParams(
                    in_channels=64,
                    vec_in_dim=32,
                    context_in_dim=32,
                    mlp_ratio=4.0,
                    theta=10000,
                    qkv_bias=True,
                    guidance_embed=True,
                    **sizes,  # type: ignore[arg-type]
                )
            ),
            "ae": flux_models.AutoEncoder(flux_models.AutoEncoderParams(256, 3, 32, 3, [1, 1, 1, 1], 1, 16, 0.3611, 0.1159)),
            "clip_l": CLIPTextModel(_text_config((32, 64, 2, 1), 1024)),
            "t5xxl": T5EncoderModel(
                T5Config(vocab_size=128, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
            ),
        }
    _fill(models, seed)
    folder.mkdir(parents=True, exist_ok=True)
    options = {option: str(folder / f"{option}.safetensors") for option in models}
    for option, model in models.items():
        tensors = {key: tensor.clone() for key, tensor in model.state_dict().items() if not key.endswith("position_ids")}
        save_file(tensors, options[option])
    cache = folder / "tokenizer_cache"
    shutil.copytree(TINY_SD / "tokenizer", cache / "openai_clip-vit-large-patch14")
    _t5_tokenizer().save_pretrained(str(cache / "google_t5-v1_1-xxl"))
    return options | {"tokenizer_cache_dir": str(cache)}


def _t5_tokenizer() -> Any:
    """T5's kind of tokenizer, over single letters."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)


def remove(folder: Path) -> None:
    """Give the disk space of a full-size model back."""
    shutil.rmtree(folder, ignore_errors=True)


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(TINY_SD / "tokenizer"))


def _text_config(sizes: tuple[int, int, int, int], vocabulary: int) -> Any:
    from transformers import CLIPTextConfig

    hidden, feed_forward, layers, heads = sizes
    tokenizer = _tokenizer()
    return CLIPTextConfig(
        vocab_size=max(vocabulary, len(tokenizer)),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=hidden,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(widths: tuple[int, ...]) -> Any:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        return AutoencoderKL(block_out_channels=widths, layers_per_block=1, **blocks)


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def _fill(models: dict[str, Any], seed: int) -> None:
    """Normal weights of the usual size for each layer, norms as the identity; fp16."""
    generator = torch.Generator().manual_seed(seed)
    for model in models.values():
        model.to_empty(device="cpu").half()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            else:
                parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
        for module in model.modules():
            if hasattr(module, "position_ids"):
                module.position_ids = torch.arange(77).unsqueeze(0)


def narrow_unet(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """sd-scripts' SD1.x U-Net, 32 to 64 channels wide, the same weights every time."""
    original_unet = importlib.import_module("library.original_unet")
    for name, value in {"BLOCK_OUT_CHANNELS": (32, 32, 64, 64), "TIMESTEP_INPUT_DIM": 32, "TIME_EMBED_DIM": 128}.items():
        monkeypatch.setattr(original_unet, name, value)
    torch.manual_seed(0)
    return original_unet.UNet2DConditionModel(8, 8, 32)
