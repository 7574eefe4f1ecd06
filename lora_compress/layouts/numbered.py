"""Modules that are known by their numbers, as cloneofsimo/lora (lora_diffusion/lora.py) wrote them.

    .safetensors    `unet:9:up`, `unet:9:down`; in the metadata `unet:9:rank` and, under `unet`, the classes of layers to look in
    .pt             a list up, down, up, down ... of one model

A number counts the linear layers (and convolutions) inside of modules of those classes, in the order of `model.modules()`. A file
has to hold all numbers up to its last, or its reader puts every later module in a wrong place. Where sizes show which layers of
Stable Diffusion 1 or 2 the numbers stand for, modules have kohya's names of them here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from .plain import PlainKeys

__all__ = ["KEY", "is_numbered", "keys_of_list", "layer_names", "numbered_metadata"]

KEY = re.compile(r"^(?P<model>[^:]+):(?P<number>\d+):(?P<side>up|down)$")
_RANK = re.compile(r"^[^:]+:\d+:rank$")
_BLOCKS = (  # of the U-Net, in the order of its modules, with their widths
    *((f"down_blocks_{block}_attentions_{index}", 320 << block) for block in range(3) for index in range(2)),
    *((f"up_blocks_{block}_attentions_{index}", 1280 >> (block - 1)) for block in (1, 2, 3) for index in range(3)),
    ("mid_block_attentions_0", 1280),
)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out_0")
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")  # as transformers' CLIPAttention defines them
_CLIP_LAYERS = {768: 12, 1024: 23}

Size = tuple[int, int]  # outputs, inputs


def is_numbered(keys: PlainKeys) -> bool:
    """Whether a module is known by its number, so that no module of its file may be left out."""
    return KEY.match(keys.down) is not None


def numbered_metadata(metadata: Mapping[str, str], ranks: Iterable[tuple[PlainKeys, int]]) -> dict[str, str]:
    """The metadata of a file with the ranks of its numbered modules made true; those of modules that it does not have go."""
    found = ((KEY.match(keys.down), rank) for keys, rank in ranks)
    told = {f"{match['model']}:{match['number']}:rank": str(rank) for match, rank in found if match}
    return {key: value for key, value in metadata.items() if not _RANK.match(key)} | told


def keys_of_list(tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by key, and metadata, of a list up, down, up, down ...: of a text encoder where all layers are its square ones.

    Raises:
        ValueError: it is no such list.
    """
    pairs = list(zip(tensors[::2], tensors[1::2], strict=False))
    if len(tensors) % 2 or not pairs or not all(_is_pair(up, down) for up, down in pairs):
        raise ValueError("no list of pairs (out, rank), (rank, in)")
    sizes = [(up.shape[0], down.shape[1]) for up, down in pairs]
    widths = {size for pair in sizes for size in pair}
    if len(widths) == 1 and widths <= set(_CLIP_LAYERS):
        model, classes = "text_encoder", ["CLIPAttention"]
    else:
        gated = any(outputs == 8 * inputs for outputs, inputs in sizes)
        convolutions = any(up.dim() > 2 for up, _ in pairs)
        classes = ["CrossAttention", "Attention", *(["GEGLU"] if gated else []), *(["ResnetBlock2D"] if convolutions else [])]
        model = "unet"
    keyed: dict[str, Tensor] = {}
    metadata = {model: json.dumps(classes)}
    for number, (up, down) in enumerate(pairs):
        keyed |= {f"{model}:{number}:up": up, f"{model}:{number}:down": down}
        metadata[f"{model}:{number}:rank"] = str(len(down))
    return keyed, metadata


def _is_pair(up: Tensor, down: Tensor) -> bool:
    return up.dim() == down.dim() and up.dim() in (2, 4) and up.shape[1] == down.shape[0] and up.is_floating_point()


def layer_names(sizes: Sequence[Size]) -> Iterator[str]:
    """kohya's names of numbered layers; nothing where the sizes are not those of Stable Diffusion 1 or 2."""
    for layers in _known():
        if [size for _, size in layers] == list(sizes):
            return iter([name for name, _ in layers])
    return iter(())


def _known() -> Iterator[list[tuple[str, Size]]]:
    """The layers of each model and set of classes, with their sizes."""
    for width, count in _CLIP_LAYERS.items():
        name = "lora_te_text_model_encoder_layers_{}_self_attn_{}"
        yield [(name.format(layer, part), (width, width)) for layer in range(count) for part in _CLIP]
        for order in (("attn1", "attn2"), ("attn1", "ff", "attn2"), ("attn1", "attn2", "ff")):  # of diffusers, over the years
            yield [layer for block, size in _BLOCKS for part in order for layer in _of_block(block, size, part, width)]


def _of_block(block: str, width: int, part: str, text: int) -> list[tuple[str, Size]]:
    """The layers of one part of a transformer block; attn2 reads text of the width `text`."""
    name = f"lora_unet_{block}_transformer_blocks_0_{part}"
    if part == "ff":
        return [(f"{name}_net_0_proj", (8 * width, width))]
    from_text = {"to_k", "to_v"} if part == "attn2" else set()
    return [(f"{name}_{layer}", (width, text if layer in from_text else width)) for layer in _ATTENTION]
