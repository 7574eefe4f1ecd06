"""Small LoRA files of every layout, and the dense update that each stands for, both written down here alone."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_compress import LowRankUpdate
from lora_compress.layouts.plain import plain_update
from lora_compress.sources import LoraSource

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
PAIRS = {  # layout, ending of down, ending of up
    "kohya": ("kohya", ".lora_down.weight", ".lora_up.weight"),
    "peft": ("peft", ".lora_A.weight", ".lora_B.weight"),
    "peft default": ("peft", ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft adapter": ("peft", ".lora_A.style-1.weight", ".lora_B.style-1.weight"),
    "mochi": ("peft", ".lora_A", ".lora_B"),
    "diffusers": ("diffusers", ".lora.down.weight", ".lora.up.weight"),
    "attention processor": ("diffusers", "_lora.down.weight", "_lora.up.weight"),
    "text encoder": ("diffusers", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "control_lora": ("control_lora", ".down", ".up"),
}


def save(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, str] | None = None, name: str = "lora.safetensors") -> Path:
    """Write a file and give its path."""
    path = folder / name
    save_file({key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}, path, metadata)
    return path


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian numbers, rounded to a type."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(up: Tensor, down: Tensor) -> Tensor:
    """up @ down, (out, in * kernel), float64."""
    up, down = up.double().reshape(len(up), -1), down.double().reshape(len(down), -1)
    return torch.einsum("or,rc->oc", up, down)


def dense(update: LowRankUpdate) -> Tensor:
    """alpha / r * up @ down, (out, in * kernel), float64."""
    return update.alpha / len(update.down) * product(update.up, update.down)


def written_back(source: LoraSource, name: str, update: LowRankUpdate, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of an update in a plain file of the layout it came in: alpha 1, or rank where the layout has none."""
    keys, root = source.plain_keys(name), abs(update.scale) ** 0.5
    down, up = update.down_matrix.double() * root, update.up_matrix.double().T * math.copysign(root, update.scale)
    return keys.tensors(name, plain_update(down, up, update.kernel, dtype, None if keys.alpha is None else 1.0, least_rank=1))


def assert_close(result: Tensor, expected: Tensor, relative: float) -> None:
    """In the Frobenius norm."""
    assert result.shape == expected.shape
    assert float((result - expected).norm()) <= relative * float(expected.norm()) + 1e-300, "the update has changed"


def cp(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_ij t[i, j, ...] a[i, o] b[j, c], (o, c, ...)."""
    return torch.einsum("ij...,io,jc->oc...", t.double(), a.double(), b.double())


def scaled(alpha: float | None, rank: int) -> float:
    """What a missing or zero alpha and any other one mean."""
    return alpha / rank if alpha and not math.isnan(alpha) else 1.0
