"""Which model a LoRA belongs to, and which part of it a module is in, from names and sizes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from ..update import ModuleShape

__all__ = ["family_of", "part_of"]

_TEXT = re.compile(
    r"^(?:(?:base_model|model)\.)*(?:lora_te|text_encoders?|text_model|lora_prior_te|encoder[._]block[._]\d+[._]layer)"
    r"(?P<number>[_.]?\d)?(?=[_.:])"
)
_SINGLE = re.compile(r"(^|[_.])(clip_l|clip_g|t5(xxl)?|qwen\w*|gemma\w*|llama\w*)[_.]transformer[_.]")  # OMI and ComfyUI
_PREFIX = re.compile(
    r"^((base_model|model|diffusion_model|transformer|unet|prior|dit)\.)*(lora_unet_+(?:unet_)?|lora_prior_unet_|lora_transformer_|lora_|lycoris_)?"
)
_WHOLE_LANGUAGE = re.compile(r"^(base_model[._]model[._])?(model[._](language_model[._])?layers|language_model)[._]")
_SEVERAL_TEXT_ENCODERS = ("sdxl", "sd3", "flux1")
_UNET = re.compile(r"(^|_)(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_|^unet:\d")
_LANGUAGE = re.compile(  # layers of a language model, which no diffusion model has without others beside them
    r"^(?:(?:base_model|model|lora_te\d?|text_encoder(?:_\d)?)[._])*(?:language_model[._])?(?:model[._])?layers[._]\d+[._]"
    r"(?:self_attn[._][qkvo]_proj|mlp[._](?:gate|up|down)_proj)$"
)

Shapes = Mapping[str, ModuleShape]  # of the denoiser, names with underscores and without prefixes


@lru_cache(1 << 13)
def part_of(name: str, family: str) -> str:
    """The part of a model: "U-Net" or "DiT", "text encoder", or "text encoder N" where the file numbers them."""
    text = _TEXT.search(name)
    if text:
        number = (text["number"] or "").strip("_.")
        first = "1" if name.startswith("text_encoder.") and family in _SEVERAL_TEXT_ENCODERS else ""
        return f"text encoder {number or first}".rstrip()
    if _SINGLE.search(name) or (_LANGUAGE.match(name) and (family == "qwen" or _WHOLE_LANGUAGE.match(name))):
        return "text encoder"
    return "U-Net" if family in ("sd1", "sd2", "sdxl") or _UNET.search(_plain(name)) else "DiT"


def family_of(shapes: Mapping[str, ModuleShape]) -> str:
    """The model family by the names of its layers; where two share names, by their widths.

    Returns:
        sd1, sd2, sdxl, sd3, flux1, flux2, lumina, hunyuan_image, anima, wan, qwen_image; of text encoders alone t5, qwen or
        the Stable Diffusion that a CLIP belongs to; unknown.
    """
    if shapes and all(map(_LANGUAGE.match, shapes)):
        return _language_model(shapes)
    parts = {name: part_of(name, "") for name in shapes}
    denoiser = {_plain(name): shape for name, shape in shapes.items() if not parts[name].startswith("text")}
    for rule in (_numbered, _unet, _double_blocks, _mmdit, _blocks, _lumina):
        family = rule(denoiser)
        if family == "sd1" and _text_encoders(shapes, set(parts.values()) - {"U-Net", "DiT"}) == "sd2":
            return "sd2"
        if family:
            return family
    return "unknown" if denoiser else _text_encoders(shapes, set(parts.values()))


def _plain(name: str) -> str:
    return _PREFIX.sub("", name).replace(".", "_")


def _matching(shapes: Shapes, pattern: str) -> dict[str, ModuleShape]:
    expression = re.compile(pattern)
    return {name: shape for name, shape in shapes.items() if expression.search(name)}


def _numbered(shapes: Shapes) -> str:
    """A U-Net whose layers have numbers (cloneofsimo/lora): its text has the width 768 in SD1, 1024 in SD2."""
    if not shapes or not all(name.startswith("unet:") for name in shapes):
        return ""
    widths = {shape.inputs for shape in shapes.values()}
    return "sd1" if 768 in widths else "sd2" if 1024 in widths else "unknown"


def _unet(shapes: Shapes) -> str:
    """SD1 has text of width 768, SD2 1024, SDXL 2048; SDXL has no attention in its first block and up to ten layers in one."""
    names = [name for name in shapes if _UNET.match(name)]
    if not names or _matching(shapes, r"^(down|up)_blocks_\d+_(?!attentions|resnets|downsamplers|upsamplers)"):
        return ""
    widths = {shape.inputs for shape in _matching(shapes, r"attn2_(processor_)?to_[kv]$").values()}
    for width, family in ((768, "sd1"), (1024, "sd2"), (2048, "sdxl")):
        if width in widths:
            return family
    small = _matching(shapes, r"^(down|up)_blocks_3|^down_blocks_0_attentions|^(input|output)_blocks_(9|1[01])_")
    return "sdxl" if not small or _matching(shapes, r"transformer_blocks_[1-9]|^add_embedding|^label_emb") else "sd1"


def _double_blocks(shapes: Shapes) -> str:
    """FLUX and Hunyuan share block names: HunyuanImage is 3584 wide, FLUX.2 has a gated MLP and one modulation for all blocks."""
    if not _matching(shapes, r"^(double|single)_blocks_\d+_|^single_transformer_blocks_\d+_|_stream_modulation"):
        return ""
    if _matching(shapes, r"_fc[12]$|_(mod|modulation)_linear$|img_attn_[qkv]$|individual_token_refiner"):
        return "hunyuan_image" if _hidden(shapes) == 3584 else "unknown"
    if _hidden(shapes) == 3584:
        return "hunyuan_image"
    if _matching(shapes, r"_stream_modulation|attn_to_qkv_mlp_proj$|ff(_context)?_linear_(in|out)$"):
        return "flux2"
    ratios = {(r"_linear1$", 9.0), (r"_mlp_0$", 6.0), (r"_linear2$", 0.25), (r"_mlp_2$", 1 / 3)}
    if _matching(shapes, r"^double_blocks_(19|[2-9]\d)_|^single_blocks_(3[89]|[4-9]\d)_"):
        return "unknown"  # more blocks than FLUX.1 has: HunyuanVideo
    gated = any(shape.outputs / shape.inputs == ratio for end, ratio in ratios for shape in _matching(shapes, end).values())
    return "flux2" if gated or _hidden(shapes) not in (0, 3072) else "flux1"


def _hidden(shapes: Shapes) -> int:
    """Width of the stream: what attention takes in."""
    attention = r"attn_(qkv|q|k|v|proj|to_[qkv]|to_qkv_mlp_proj)"
    found = _matching(shapes, rf"({attention}|linear1|_fc1|mlp_0|(mod|modulation)_lin(ear)?)$")
    return next((shape.inputs for shape in found.values()), 0)


def _mmdit(shapes: Shapes) -> str:
    """SD3 in its own names, and diffusers' transformer_blocks of SD3, FLUX.1, FLUX.2 and Qwen-Image without their other blocks."""
    if _matching(shapes, r"^joint_blocks_\d+_"):
        return "sd3"
    blocks = _matching(shapes, r"^transformer_blocks_\d+_")
    if not blocks:
        return ""
    if _matching(blocks, r"_(img|txt)_(mlp|mod)_"):
        return "qwen_image"
    if _matching(blocks, r"ff(_context)?_linear_(in|out)$"):
        return "flux2"
    attention = r"attn2?_(to_[qkv]|to_out(_0)?|to_add_out|add_[qkv]_proj)$"
    joint = _matching(blocks, attention + r"|norm1(_context)?_linear$|ff(_context)?_net_")
    width = _hidden(joint)
    if width == 3072:
        last = max(int(name.split("_")[2]) for name in blocks)
        return "flux1" if last < 19 or _matching(blocks, r"_ff_") else "qwen_image"
    return "sd3" if joint and width in (0, 1536, 2432) else "unknown"


def _blocks(shapes: Shapes) -> str:
    """Anima (Cosmos names its projections q_proj) and Wan (q, k, v, o, or diffusers' attn1 and attn2)."""
    anima = r"^blocks_\d+_((self|cross)_attn_(q|k|v|output)_proj$|mlp_layer[12]$|adaln_modulation_)"
    if _matching(shapes, anima + "|^llm_adapter_"):
        return "anima"
    wan = r"^blocks_\d+_((self|cross)_attn_(q|k|v|o|k_img|v_img)|ffn_(0|2|net_)|attn[12]_(to_|add_))"
    return "wan" if _matching(shapes, wan) else ""


def _lumina(shapes: Shapes) -> str:
    """Lumina Image 2 is 2304 wide; Z-Image has its names and another width."""
    layer = r"(attention_(qkv|out|to_[qkv])|attn_|feed_forward_|adaLN_)"
    found = _matching(shapes, rf"^(layers|noise_refiner|context_refiner)_\d+_{layer}")
    widths = {shape.inputs for name, shape in found.items() if not name.endswith(("w2", "linear_2", "modulation_1"))}
    return "" if not found else "lumina" if not widths or 2304 in widths else "unknown"


def _text_encoders(shapes: Mapping[str, ModuleShape], parts: set[str]) -> str:
    """A LoRA of text encoders alone: one CLIP of SD1 or SD2 by its width, two of them SDXL; a third, or a T5, may be several."""
    if shapes and all(re.search(r"encoder[._]block[._]\d+[._]layer[._]", name) for name in shapes):
        return "t5"
    clip = {name: shape for name, shape in shapes.items() if "text_model" in name}
    if not clip or "text encoder 3" in parts:
        return "unknown"
    if "text encoder 2" in parts:
        return "sdxl"
    widths = {shape.inputs for name, shape in clip.items() if re.search(r"(q_proj|k_proj|v_proj|fc1)$", name)}
    if parts == {"text encoder"}:
        return "sd1" if 768 in widths else "sd2" if 1024 in widths else "unknown"
    return "unknown"


def _language_model(shapes: Mapping[str, ModuleShape]) -> str:
    """Qwen by its width and that of its keys: 2.5-VL 7B (3584, 512) of Qwen-Image, 3 4B and 8B (2560 and 4096, 1024), 3 0.6B."""
    sizes = {(s.inputs, s.outputs) for name, s in shapes.items() if name.endswith("k_proj")}
    return "qwen" if sizes & {(3584, 512), (2560, 1024), (4096, 1024), (1024, 1024)} else "unknown"
