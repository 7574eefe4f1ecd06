"""Sizes of a FLUX model other than its own: sd-scripts counts the blocks of a checkpoint and has every width as a constant.

Widths are read from the shapes in the four files; what they do not tell is taken to be in the usual proportion.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.compress_model import checkpoint_shapes
from lora_compress import LoraCompressError

__all__ = ["adapt_flux_sizes"]

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
_CLIP_HEAD = 64  # channels of a head of CLIP, which no shape shows


def adapt_flux_sizes(args: argparse.Namespace) -> None:
    """Let sd-scripts build FLUX's transformer, CLIP-L, T5 and autoencoder in the sizes of their files, as far as they are files.

    Raises:
        LoraCompressError: a file cannot be read, or lacks tensors of the model that it should hold.
    """
    from library import flux_models, flux_utils

    parts: dict[str, Callable[[Shapes], dict[str, Any]]] = {
        "pretrained_model_name_or_path": _transformer,
        "ae": _autoencoder,
        "clip_l": _clip,
        "t5xxl": _t5,
    }
    sizes = {option: _sizes(option, getattr(args, option), read) for option, read in parts.items()}
    for spec in flux_models.configs.values():
        spec.params = replace(spec.params, **sizes["pretrained_model_name_or_path"])
        spec.ae_params = replace(spec.ae_params, **sizes["ae"])
    flux_utils.CLIPConfig = _sized(flux_utils.CLIPConfig, sizes["clip_l"])
    flux_utils.T5Config = _sized(flux_utils.T5Config, sizes["t5xxl"])


def _sizes(option: str, name: str | None, read: Callable[[Shapes], dict[str, Any]]) -> dict[str, Any]:
    if not name or not Path(name).is_file():
        return {}
    try:
        return read(checkpoint_shapes(Path(name)))
    except KeyError as error:
        raise LoraCompressError(
            f"{option}={name}: has no {error.args[0]}: it is no file of FLUX's that sd-scripts reads"
        ) from error


def _sized(config: Callable[..., Any], sizes: dict[str, Any]) -> Callable[..., Any]:
    return lambda **usual: config(**{**usual, **sizes})


def _transformer(shapes: Shapes) -> dict[str, Any]:
    if "img_in.weight" not in shapes:  # a file of diffusers' or one of three, which sd-scripts converts or joins
        return {}
    hidden, channels = shapes["img_in.weight"]
    if "vector_in.in_layer.weight" not in shapes:  # Chroma
        return {}
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    return {
        "hidden_size": hidden,
        "in_channels": channels,
        "context_in_dim": shapes["txt_in.weight"][1],
        "vec_in_dim": shapes["vector_in.in_layer.weight"][1],
        "mlp_ratio": shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
        "num_heads": hidden // head,
        "axes_dim": [head // 8, head // 16 * 7, head // 16 * 7],  # 16, 56, 56 of 128
    }


def _autoencoder(shapes: Shapes) -> dict[str, Any]:
    shapes = {key.removeprefix("vae."): shape for key, shape in shapes.items()}
    width = shapes["encoder.conv_in.weight"][0]
    levels = _count(shapes, "encoder.down.")
    return {
        "ch": width,
        "ch_mult": [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] // width for level in range(levels)],
        "num_res_blocks": _count(shapes, "encoder.down.0.block."),
        "z_channels": shapes["decoder.conv_in.weight"][1],
    }


def _clip(shapes: Shapes) -> dict[str, Any]:
    words, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": words,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "text_model.encoder.layers."),
        "num_attention_heads": max(width // _CLIP_HEAD, 1),
    }


def _t5(shapes: Shapes) -> dict[str, Any]:
    words, width = shapes["shared.weight"] if "shared.weight" in shapes else shapes["encoder.embed_tokens.weight"]
    heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][1]
    return {
        "vocab_size": words,
        "d_model": width,
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": _count(shapes, "encoder.block."),
        "num_heads": heads,
    }


def _count(shapes: Shapes, beginning: str) -> int:
    """Entries of the list whose members' keys are `beginning`, a number and a dot.

    Raises:
        KeyError: there are none.
    """
    count = len({key[len(beginning) :].partition(".")[0] for key in shapes if key.startswith(beginning)})
    if not count:
        raise KeyError(f"{beginning}0")
    return count
