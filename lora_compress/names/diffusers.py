"""From the names of a LoRA's modules to the layers of a diffusers pipeline: kohya's, sgm's and Black Forest Labs' names.

diffusers has fused layers apart, so a module can become several: they share its `down`, and each gets its rows of `up`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..inspection.comparison import match_names
from ..update import LowRankUpdate
from ..weighting.transformers import TRANSFORMER_BLOCKS
from .base_layers import SGM_OUTSIDE, SGM_RESNET

__all__ = ["find_layers", "sgm_name"]

Sizes = Mapping[str, int]  # outputs of each layer, by its full name such as unet.mid_block.attentions.0.proj_in

_RESNET = SGM_RESNET | {"in_layers_0": "norm1", "out_layers_0": "norm2"}
_BLOCK = re.compile(r"^(input|output)_blocks_(\d+)_(\d+)_(.+)$")
_MIDDLE = re.compile(r"^middle_block_([012])_(.+)$")
_UNET = "lora_unet_"

_TRANSFORMER = re.compile(r"^lora_unet_(double_blocks|single_blocks|joint_blocks)_(\d+)_(.+)$")
# sd-scripts numbers T5 the third text encoder; in diffusers' FLUX pipeline it is the second.
_T5 = re.compile(r"^lora_te3_")


def find_layers(updates: Mapping[str, LowRankUpdate], sizes: Sizes) -> tuple[dict[str, LowRankUpdate], list[str]]:
    """{full name of a layer: its update}, and the modules that have no layer here.

    Args:
        updates: by module name, of any layout.
        sizes: outputs of each layer of the pipeline, by full name: component, a dot, name of the layer.
    """
    found: dict[str, LowRankUpdate] = {}
    rest: dict[str, LowRankUpdate] = {}
    for name, update in updates.items():
        parts = _transformer_layers(name, sizes)
        if not parts:
            rest[name] = update
            continue
        begin = 0
        for layer in parts:
            end = begin + sizes[layer]
            found[layer] = LowRankUpdate(update.down, update.up[begin:end], update.alpha)
            begin = end
        if begin != len(update.up):
            return {}, [name]
    two_encoders = not any(name.startswith("text_encoder_3.") for name in sizes)
    asked = {sgm_name(name) or (_T5.sub("lora_te2_", name) if two_encoders else name): name for name in rest}
    pairs = match_names(asked, sizes)
    found |= {pairs[name]: rest[asked[name]] for name in pairs}
    return found, [original for name, original in asked.items() if name not in pairs]


def sgm_name(name: str) -> str | None:
    """diffusers' name, with underscores, for one of sgm's SDXL U-Net; None for another name.

    sgm_name("lora_unet_input_blocks_4_1_proj_in")  # lora_unet_down_blocks_1_attentions_0_proj_in
    """
    if not name.startswith(_UNET):
        return None
    plain = name.removeprefix(_UNET)
    inner = SGM_OUTSIDE.get(plain)
    if middle := _MIDDLE.match(plain):
        place = ("resnets_0", "attentions_0", "resnets_1")[int(middle[1])]
        inner = f"mid_block_{place}_{_RESNET.get(middle[2], middle[2])}"
    elif block := _BLOCK.match(plain):
        inner = _block_name(block[1], int(block[2]), int(block[3]), block[4])
    return inner and _UNET + inner


def _block_name(side: str, number: int, part: int, rest: str) -> str:
    """Three entries of the list make a block: on the way down two layers and a downsampler, on the way up three layers."""
    if side == "input":
        block, layer = divmod(number - 1, 3)
        kind = "down_blocks"
        if rest == "op":
            return f"{kind}_{block}_downsamplers_0_conv"
    else:
        block, layer = divmod(number, 3)
        kind = "up_blocks"
        if rest == "conv":
            return f"{kind}_{block}_upsamplers_0_conv"
    if part == 0:
        return f"{kind}_{block}_resnets_{layer}_{_RESNET.get(rest, rest)}"
    return f"{kind}_{block}_attentions_{layer}_{rest}"


def _transformer_layers(name: str, sizes: Sizes) -> list[str]:
    """The layers that a module of an original FLUX or SD3 transformer is in diffusers, in the order of its rows."""
    match = _TRANSFORMER.match(name)
    if match is None:
        return []
    blocks, table = TRANSFORMER_BLOCKS[match[1]]
    layers = [f"transformer.{blocks}.{match[2]}.{layer}" for layer in table.get(match[3], ())]
    return layers if all(layer in sizes for layer in layers) else []
