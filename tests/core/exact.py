"""LoRA files made of integers, whose singular value decompositions are exact in binary: no processor rounds them otherwise.

Factors are s_i times rows of a Hadamard matrix, mirrored by I - 2 v v^T / |v|^2. The rows are orthogonal, their squared norm is a
power of four and |v|^2 a power of two, so that every product and every sum in their Gram matrices is a short binary fraction.
Random numbers of torch are not used: they may differ between its versions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["LAYOUTS", "exact_file", "exact_rows", "integers"]

INTEGER_SPECTRUM = (16, 13, 11, 9, 6, 4, 3, 1)  # in sixteenths; exact in float32
BINARY_SPECTRUM = tuple(2**power for power in range(7, -1, -1))  # exact in float16
_MODULES = {  # outputs, inputs, kernel: two text encoder layers and three of the U-Net
    "te": (64, 100, ()),
    "te_narrow": (20, 64, ()),
    "attention": (64, 64, ()),
    "proj": (64, 96, (1, 1)),
    "conv": (20, 8, (3, 3)),
}
_KOHYA = {
    "te": "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "te_narrow": "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
    "attention": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "proj": "lora_unet_mid_block_attentions_0_proj_in",
    "conv": "lora_unet_down_blocks_0_resnets_0_conv1",
}
_DOTTED = {
    "te": "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "te_narrow": "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
    "attention": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "proj": "unet.mid_block.attentions.0.proj_in",
    "conv": "unet.down_blocks.0.resnets.0.conv1",
}
LAYOUTS = {  # names, endings of down and up, type, spectrum
    "kohya": (_KOHYA, ".lora_down.weight", ".lora_up.weight", torch.float32, INTEGER_SPECTRUM),
    "kohya alone": (_KOHYA, ".lora_down.weight", ".lora_up.weight", torch.float32, INTEGER_SPECTRUM),
    "peft": (_DOTTED, ".lora_A.weight", ".lora_B.weight", torch.float16, BINARY_SPECTRUM),
    "diffusers": (_DOTTED, ".lora.down.weight", ".lora.up.weight", torch.float32, INTEGER_SPECTRUM),
}


def integers(count: int, least: int, most: int, seed: int) -> list[int]:
    """`count` whole numbers from `least` to `most`, by the linear congruential generator of Knuth's MMIX."""
    state, found = seed, []
    for _ in range(count):
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        found.append(least + (state >> 33) % (most - least + 1))
    return found


def exact_rows(count: int, size: int, seed: int) -> np.ndarray:
    """Orthogonal rows of short binary fractions, (count, size); their squared norm is the largest power of 4 up to `size`."""
    width = 4 ** ((size.bit_length() - 1) // 2)
    hadamard = np.ones((1, 1))
    while len(hadamard) < width:
        hadamard = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    rows = np.zeros((count, size))
    rows[:, :width] = hadamard[:count]
    mirror = _vector(size, seed)
    return rows - np.outer(rows @ mirror, mirror) * (2.0 / float(mirror @ mirror))


def _vector(size: int, seed: int) -> np.ndarray:
    """Small whole numbers whose squares add up to a power of two: by Lagrange, four more squares can always make it so."""
    free = integers(size - 4, -1, 2, seed)
    total = sum(value * value for value in free)
    missing = 2 ** total.bit_length() - total
    last = next(four for four in itertools.product(range(16), repeat=4) if sum(value * value for value in four) == missing)
    return np.array([*free, *last], dtype=np.float64)


def exact_factors(
    outputs: int, inputs: int, kernel: tuple[int, ...], spectrum: Sequence[int], divisor: float, seed: int
) -> tuple[Tensor, Tensor]:
    """down (r, in, *kernel) and up (out, r, 1, ...), float32, with singular values in the ratios of `spectrum`."""
    rank = len(spectrum)
    strengths = np.array(spectrum, dtype=np.float64)[:, None] / divisor
    down = exact_rows(rank, inputs * int(np.prod(kernel)), seed) * strengths
    up = exact_rows(rank, outputs, seed + 1).T / 16.0
    pair = torch.from_numpy(down.reshape(rank, inputs, *kernel)), torch.from_numpy(up.reshape(outputs, rank, *[1] * len(kernel)))
    for factor in pair:
        assert torch.equal(factor.float().double(), factor), "float32 does not hold the factor"
    return pair[0].float().contiguous(), pair[1].float().contiguous()


def exact_file(layout: str, path: Path) -> Path:
    """A LoRA of five modules in one of LAYOUTS, each of a strength of its own.

    A tensor that belongs to no module is beside them, but not in `kohya alone`, as some programs refuse such files.
    """
    names, down_end, up_end, dtype, spectrum = LAYOUTS[layout]
    tensors: dict[str, Tensor] = {}
    for index, (module, (outputs, inputs, kernel)) in enumerate(_MODULES.items()):
        down, up = exact_factors(outputs, inputs, kernel, spectrum, 2.0 ** (4 + (0, 3, 1, 2, 5)[index]), seed=10 * index + 1)
        assert torch.equal(down.to(dtype).float(), down) and torch.equal(up.to(dtype).float(), up), "the type does not hold it"
        tensors[names[module] + down_end], tensors[names[module] + up_end] = down.to(dtype), up.to(dtype)
        if layout.startswith("kohya"):
            tensors[names[module] + ".alpha"] = torch.tensor(float(2 ** (index % 3)))
    if layout != "kohya alone":
        tensors["emb_params"] = torch.arange(12.0).reshape(3, 4)
    save_file(tensors, path, {"ss_network_dim": str(len(spectrum)), "ss_network_alpha": "1"})
    return path
