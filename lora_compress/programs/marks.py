"""By which modules the programs recognise what a file is, and which files one of them takes whole or not at all.

A program that looks for one key, finds it missing and takes the file for another kind may know none of the other keys. Each row
names the program, the kind of file, the modules and the function in which it was read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

__all__ = ["MARKS", "Mark", "is_taken_whole", "missing_of_whole", "recognition_marks"]

_SD12, _SDXL, _FLUX2 = frozenset({"sd1", "sd2"}), frozenset({"sdxl"}), frozenset({"flux2"})
_ATTN2 = r"attn2[._](processor[._])?to_[kv](_lora)?$"
_TIME = r"time_emb_proj$|[._]emb_layers[._]1$"


@dataclass(frozen=True)
class Mark:
    """What one program looks for in one kind of file.

    Args:
        program: as messages name it.
        kind: of file, in words.
        groups: regular expressions for names of modules. One module of each group has to stay: of the first expression of the group
            that the file has a match for, the strongest.
        source: where the program does so.
        families: in which this holds; None: in all.
    """

    program: str
    kind: str
    groups: tuple[tuple[str, ...], ...]
    source: str
    families: frozenset[str] | None = None

    def kept(self, squared_norms: Mapping[str, float], family: str) -> list[str]:
        """The modules of a file that have to stay for it."""
        if family and self.families is not None and family not in self.families:
            return []
        found = []
        for group in self.groups:
            matching = next((names for pattern in group if (names := _matching(pattern, squared_norms))), [])
            if matching:
                found.append(max(matching, key=lambda name: squared_norms[name]))
        return found


_INVOKE_FLUX = "patches/lora_conversions/flux_diffusers_lora_conversion_utils.py, is_state_dict_likely_in_flux_diffusers_format"
_INVOKE_FLUX2 = "model_manager/configs/lora.py, _is_flux2_lora_state_dict and _get_flux2_lora_variant"
_DOT = r"(^|\.)"
MARKS = (
    Mark(
        "InvokeAI",
        "LoRA of Stable Diffusion 1 and 2",
        ((_ATTN2, _TIME, r"self_attn[._][qkv]_proj$"),),
        "model_manager/util/model_util.py, lora_token_vector_length",
        _SD12,
    ),
    Mark(
        "InvokeAI",
        "LoRA of SDXL",
        tuple(
            (_ATTN2, _TIME, r"_transformer_blocks_([2-9]|1\d)_", rf"^lora_te{number}_.*self_attn_[qkv]_proj$") for number in (1, 2)
        ),
        "model_manager/configs/lora.py, _get_base_or_raise",
        _SDXL,
    ),
    Mark("ComfyUI", "Wan Fun LoRA", ((r"^lora_unet__blocks_0_cross_attn_k$",),), "comfy/lora_convert.py, convert_lora"),
    Mark(
        "ComfyUI, Forge and InvokeAI",
        "control LoRA of Black Forest Labs",
        ((r"^img_in$",),),
        "comfy/lora_convert.py, convert_lora; packages_3rdparty/comfyui_lora_collection/lora.py; is_state_dict_likely_flux_control",
    ),
    Mark(
        "ComfyUI",
        "USO LoRA",
        ((r"^single_blocks\.37\.processor\.qkv(_lora)?$",), (r"^double_blocks\.18\.processor\.qkv_lora2$",)),
        "comfy/lora_convert.py, convert_lora",
    ),
    Mark(
        "diffusers",
        "LoRA of Wan for image to video",
        ((r"cross_attn[._]k_img$", r"\.attn2\.add_k_proj$"), (r"cross_attn[._]v_img$", r"\.attn2\.add_v_proj$")),
        "loaders/lora_conversion_utils.py and lora_pipeline.py, is_i2v_lora",
    ),
    Mark(
        "diffusers",
        "LoRA of HunyuanVideo in its original names",
        ((r"\.img_attn_qkv$",),),
        "loaders/lora_pipeline.py, HunyuanVideoLoraLoaderMixin.lora_state_dict",
    ),
    Mark(
        "InvokeAI",
        "LoRA of FLUX.1 in diffusers' names",
        (
            (r"^(transformer|base_model\.model)\.single_transformer_blocks\.0\.attn\.to_q$",),
            (r"^(transformer|base_model\.model)\.transformer_blocks\.0\.attn\.add_q_proj$",),
        ),
        _INVOKE_FLUX,
    ),
    Mark(
        "InvokeAI",
        "LoRA of FLUX.2",
        (
            (rf"{_DOT}context_embedder$", r"[._]txt_in$"),
            (rf"{_DOT}time_text_embed\.text_embedder\.linear_1$", r"[._]vector_in"),
            (rf"{_DOT}single_transformer_blocks\.0\.attn\.to_qkv_mlp_proj$", r"\.attn\.to_qkv_mlp_proj$"),
            (rf"{_DOT}transformer_blocks\.0\.ff\.linear_in$", r"\.ff(_context)?\.linear_in$"),
            (rf"{_DOT}transformer_blocks\.0\.attn\.to_add_out$",),
            (rf"{_DOT}transformer_blocks\.0\.attn\.to_out\.0$",),
            (r"[._]img_attn[._]proj$",),
            (r"[._]img_mlp[._]0$",),
        ),
        f"{_INVOKE_FLUX2}; {_INVOKE_FLUX}",
        _FLUX2,
    ),
    Mark(
        "InvokeAI",
        "LoRA of Anima",
        ((r"blocks[._]\d+[._](mlp[._]layer|adaln_modulation|(cross|self)_attn[._]([qkv]|output)_proj)",),),
        "patches/lora_conversions/anima_lora_constants.py, has_cosmos_dit_kohya_keys_strict",
        frozenset({"anima"}),
    ),
)

# What the converters of diffusers take out of a file without asking whether it is there (loaders/lora_conversion_utils.py).
_WHOLE = (
    r"^lora_unet_blocks_\d+_(self_attn|cross_attn|ffn)_",  # _convert_musubi_wan_lora_to_diffusers
    r"^diffusion_model\.(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward|adaLN)",  # ..._lumina2_...
    r"^img_in$",  # _convert_bfl_flux_control_lora_to_diffusers
    r"^base_model\.model\.(double|single)_blocks\.",  # _convert_fal_kontext_lora_to_diffusers
)
_WAN_BLOCK = re.compile(r"^lora_unet_blocks_(\d+)_(.+)$")
_WAN_MODULES = (*(f"{where}_attn_{what}" for where in ("self", "cross") for what in "qkvo"), "ffn_0", "ffn_2")


def recognition_marks(squared_norms: Mapping[str, float], family: str = "") -> dict[str, Mark]:
    """The modules that have to stay for the programs to recognise the file, each with the first mark that asks for it.

    Args:
        squared_norms: ||dW_m||_F^2 by module name, or another measure of what a module weighs.
        family: of the model, as `LoraSource.family` tells it; "": marks of every family hold.
    """
    found: dict[str, Mark] = {}
    for mark in MARKS:
        for name in mark.kept(squared_norms, family):
            found.setdefault(name, mark)
    return found


def is_taken_whole(names: Collection[str]) -> bool:
    """Whether diffusers refuses a file with modules of these names as soon as one of them is missing."""
    return any(_matching(pattern, names) for pattern in _WHOLE)


def missing_of_whole(names: Collection[str]) -> list[str]:
    """Modules that diffusers misses in a file for Wan in kohya's names: every block of one that goes that far has ten of them."""
    blocks = {match[1] for name in names if (match := _WAN_BLOCK.match(name)) and match[2].startswith(("self_", "cross_", "ffn_"))}
    wanted = (f"lora_unet_blocks_{block}_{module}" for block in range(len(blocks)) for module in _WAN_MODULES)
    present = set(names)
    return [name for name in wanted if name not in present]


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    expression = _compiled(pattern)
    return [name for name in names if expression.search(name)]


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
