"""Where in its model a module stands, from its name: the block, and the kind of layer in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Place", "place_of"]

_PREFIX = re.compile(
    r"^(base_model_model_)?(lora_unet|lora_transformer|lora_te\d*|text_encoders?(_\d+)?(_transformer)?|unet|transformer|diffusion_model|"
    r"model_diffusion_model|te\d*)_"
)
_INNER = r"(?:transformer_blocks_\d+_)?"  # a column for each would make SDXL's middle block ten columns wide
_RULES = (
    re.compile(rf"(?P<stage>down|up)_blocks_(?P<a>\d+)_(?:attentions|resnets)_(?P<b>\d+)_{_INNER}(?P<kind>.+)"),
    re.compile(r"(?P<stage>down|up)_blocks_(?P<a>\d+)_(?P<kind>(?:down|up)samplers_.+)"),
    re.compile(rf"(?P<stage>mid)_block_(?:attentions|resnets)_(?P<a>\d+)_{_INNER}(?P<kind>.+)"),
    re.compile(rf"(?P<stage>input|output)_blocks_(?P<a>\d+)_\d+_{_INNER}(?P<kind>.+)"),
    re.compile(rf"(?P<stage>middle)_block_(?P<a>\d+)_{_INNER}(?P<kind>.+)"),
)
_GENERIC = re.compile(r"(?P<stage>[a-z_]*?[a-z])_(?P<a>\d+)_(?P<kind>.+)", re.IGNORECASE)
_SHORT = {"input": "in", "output": "out", "middle": "mid"}
_LAST = 1000
_ORDER = ("in", "down", "mid", "out", "up", "double", "joint", "block", "single", "layer")


@dataclass(frozen=True)
class Place:
    """A block of the model and a kind of layer; blocks sort in the order in which the model runs them."""

    block: str
    kind: str
    order: tuple[int, str, tuple[int, ...]]


def place_of(name: str) -> Place:
    """The place of a module by its name in kohya's, PEFT's or diffusers' writing.

    `lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q` is attn1_to_q of block "down 1.0".
    """
    plain = name.replace(".", "_")
    plain = plain[match.end() :] if (match := _PREFIX.match(plain)) else plain
    for rule in _RULES:
        if match := rule.fullmatch(plain):
            return _place(match["stage"], [value for key, value in match.groupdict().items() if key in ("a", "b")], match["kind"])
    if match := _GENERIC.fullmatch(plain):
        return _place(_stage(match["stage"]), [match["a"]], match["kind"])
    return Place("other", plain, (len(_ORDER) + 1, "", ()))


def _place(stage: str, numbers: list[str], kind: str) -> Place:
    stage = _SHORT.get(stage, stage)
    rank = _ORDER.index(stage) if stage in _ORDER else len(_ORDER)
    last = (_LAST,) if "samplers_" in kind else ()  # a block ends with its sampler
    return Place(f"{stage} {'.'.join(numbers)}", kind, (rank, stage, (*map(int, numbers), *last)))


def _stage(stem: str) -> str:
    """double_blocks is double, single_transformer_blocks single, transformer_blocks block, text_model_encoder_layers layer."""
    words = [word for word in stem.split("_") if word not in ("transformer", "text", "model", "encoder", "decoder")]
    last = (words or stem.split("_"))[-1].removesuffix("s")
    return words[0] if last == "block" and len(words) > 1 else last
