"""What a file of weights is that holds no LoRA: a checkpoint, a VAE, an embedding ..., told from its keys and shapes."""

from __future__ import annotations

import re

from ..files.tensors import TensorFile
from ..names.families import family_of
from .foreign import foreign_kind
from .survey import ModuleShape

__all__ = ["what_it_holds"]

_TITLES = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3",
    "flux1": "FLUX.1",
    "flux2": "FLUX.2",
    "lumina": "Lumina Image 2",
    "hunyuan_image": "HunyuanImage",
    "anima": "Anima",
    "wan": "Wan",
    "qwen_image": "Qwen-Image",
}
_MOST_KEYS = 20_000  # that are looked at

# Keys, and what a file is that has one of them; those that a full checkpoint may have as well come after it.
_KINDS: tuple[tuple[str, str], ...] = (
    (r"^(emb_params$|string_to_param\.|clip_[lg]$|<[^<>]+>$)", "a textual inversion embedding"),
    (r"^(320|640|768|1024|1280|2048)\.[01]\.linear\.", "a hypernetwork"),
    (
        r"^(control_model|controlnet)\.|(^|\.)(input_hint_block|controlnet_cond_embedding|controlnet_(down|mid)?_?blocks?)\.",
        "a ControlNet",
    ),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"(^|\.)motion_modules\.", "an AnimateDiff motion module"),
    (r"\.lora_(down|up)$", "a LoRA for nunchaku (SVDQuant), which only nunchaku reads: give the one that it was converted from"),
    (r"\.(qweight|wscales|smooth_factor)$", "a model quantized by nunchaku (SVDQuant), GPTQ or AWQ"),
    (r"\.quant_state\.bitsandbytes|\.absmax$", "a model quantized by bitsandbytes"),
    (r"(^|\.)(exp_avg|exp_avg_sq|param_groups)(\.|$)", "the state of an optimizer"),
)
_LATER: tuple[tuple[str, str], ...] = (
    (
        r"^(first_stage_model\.|vae\.)?(en|de)coder\.(down|up|mid)(_blocks?)?\.|^(first_stage_model\.|vae\.)?decoder\.conv_in\.",
        "a VAE",
    ),
    (r"(^|\.)text_model\.encoder\.layers\.\d+\.|^transformer\.resblocks\.", "a CLIP text encoder"),
    (r"(^|\.)encoder\.block\.\d+\.layer\.", "a T5 text encoder"),
    (r"(^|\.)model\.layers\.\d+\.self_attn\.", "a language model, such as a text encoder of Qwen or Gemma"),
    (r"^(model\.)?(body|conv_first|upconv1|RDB\d|sub)\.", "an upscaler"),
)


def what_it_holds(file: TensorFile) -> str:
    """What a file without a LoRA is, and three of its keys: "a VAE (decoder.conv_in.weight, ... and 247 more)"."""
    keys = list(file)[:_MOST_KEYS]
    shown = ", ".join(key[:100] for key in keys[:3]) + (f" and {len(file) - 3} more" if len(file) > 3 else "")
    return f"{_kind(file, keys)} ({shown})" if keys else "a file without tensors"


def _kind(file: TensorFile, keys: list[str]) -> str:
    kind = _first(_KINDS, keys)
    if kind:
        return kind
    adapter = foreign_kind(keys)
    if adapter:
        return f"{adapter}, which is no LoRA"
    return _model(file, keys) or _first(_LATER, keys) or "weights of an unknown kind"


def _first(kinds: tuple[tuple[str, str], ...], keys: list[str]) -> str:
    return next((what for mark, what in kinds if any(map(re.compile(mark).search, keys))), "")


def _model(file: TensorFile, keys: list[str]) -> str:
    """A diffusion model by the layers that a LoRA of its family would name; a checkpoint where it holds more than that."""
    weights = {key.removesuffix(".weight"): file[key].shape for key in keys if key.endswith(".weight")}
    shapes = {name: ModuleShape(shape[0], shape[1], shape[2:], 0) for name, shape in weights.items() if len(shape) >= 2}
    denoiser = {name: shape for name, shape in shapes.items() if not _first(_LATER, [f"{name}."])}
    beside = any(re.match(r"(first_stage_model|cond_stage_model|conditioner|vae|text_encoders?)\.", key) for key in keys)
    family = family_of(denoiser) if denoiser else "unknown"
    if family == "unknown":
        return "a full checkpoint" if beside and any("diffusion_model." in key for key in keys) else ""
    title = _TITLES.get(family, family)
    return f"a full checkpoint of {title}" if beside else f"the diffusion model of {title} itself, without text encoder and VAE"
