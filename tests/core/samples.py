"""Small LoRA files of every layout, packed ones of every codec, and the dense updates that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from core.layouts.files import PAIRS, cp, dense, product, random, save, scaled
from torch import Tensor

from lora_compress import CompressionSettings, LowRankUpdate, open_lora
from lora_compress.engine.to_file import compress_file

LAYOUTS = (*PAIRS, "mid", "loha", "lokr", "glora", "full")
CODECS: dict[str, dict[str, object]] = {
    **{f"int{bits}": {"bits": bits} for bits in (2, 3, 4, 5, 6, 8)},
    "static": {"bits": 4, "strategy": "static"},
    "nf4": {"bits": 4, "strategy": "nf4"},
    "mixed": {"bits": 4, "strategy": "mixed"},
    "entropy": {"bits": 4, "strategy": "entropy"},
    "progressive": {"bits": 4, "strategy": "entropy", "progressive": True},
    "channels": {"bits": 4, "channel_threshold": 0.5},
    "entropy channels": {"bits": 3, "strategy": "entropy", "channel_threshold": 0.5},
}
CARRIED = {"emb_params": random(3, 4), "lora_unet_n.w_norm": random(5).half(), "count": torch.tensor([7])}


def falling(rank: int, *shape: int, seed: int = 0, power: float = 1.0) -> Tensor:
    """Gaussian rows that get weaker as 1 / i^power."""
    rows = random(rank, *shape, seed=seed)
    return rows * (1.0 + torch.arange(rank)).pow(-power).view(-1, *[1] * len(shape))


def sample(
    layout: str,
    name: str,
    outputs: int = 12,
    inputs: int = 10,
    rank: int = 4,
    kernel: tuple[int, ...] = (),
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    magnitude: float = 0.3,
    power: float = 1.0,
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one module in a layout, and its dense update (out, in * kernel), float64.

    GLoRA and LoKr have no convolutions here, and alpha counts for nothing where the layout has none.
    """
    ones = (1,) * len(kernel)
    down = (falling(rank, inputs, *kernel, seed=seed, power=power) * magnitude).to(dtype)
    up = random(outputs, rank, *ones, seed=seed + 1).to(dtype)
    if layout in PAIRS:
        _, down_end, up_end = PAIRS[layout]
        tensors, matrix, divisor = {name + down_end: down, name + up_end: up}, product(up, down), rank
    elif layout == "mid":
        mid, narrow = random(rank, rank, *kernel, seed=seed + 2).to(dtype), (random(rank, inputs, *ones, seed=seed)).to(dtype)
        tensors = {f"{name}.lora_down.weight": narrow, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
        matrix, divisor = cp(mid, up.double().flatten(1).T, narrow.double().flatten(1)).flatten(1), rank
    elif layout == "loha":
        other = [random(outputs, rank, seed=seed + 2).to(dtype), random(rank, inputs, *kernel, seed=seed + 3).to(dtype)]
        parts = {"hada_w1_a": up.reshape(outputs, rank), "hada_w1_b": down, "hada_w2_a": other[0], "hada_w2_b": other[1]}
        tensors = {f"{name}.{part}": tensor for part, tensor in parts.items()}
        matrix, divisor = product(up, down) * product(*other), rank
    elif layout == "lokr":
        small, a, b = random(2, 2, seed=seed).to(dtype), random(outputs, rank, seed=seed + 2).to(dtype), down.flatten(1)
        tensors = {f"{name}.lokr_w1": small, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
        matrix, divisor = torch.kron(small.double(), product(a, b)), rank
    elif layout == "glora":
        parts = {"a1": random(inputs, rank), "a2": torch.zeros(rank, inputs), "b1": up.flatten(1), "b2": down.flatten(1)}
        tensors = {f"{name}.{part}.weight": tensor.to(dtype) for part, tensor in parts.items()}
        matrix, divisor = product(up, down), rank
    else:
        whole = product(up, down).reshape(outputs, inputs, *kernel).to(dtype)
        return {f"{name}.diff": whole}, whole.double().flatten(1)
    if alpha is not None and layout != "control_lora":
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        matrix = matrix * scaled(alpha, divisor)
    return tensors, matrix


def sample_file(layout: str, folder: Path, carried: Mapping[str, Tensor] = CARRIED, name: str = "lora.safetensors") -> Path:
    """A linear layer, a wider one and, where the layout allows it, a convolution; with tensors that are carried through."""
    first, _ = sample(layout, "lora_unet_mid_block_attentions_0_proj_in", alpha=2.0, dtype=torch.float16)
    second, _ = sample(layout, "lora_te_text_model_encoder_layers_0_mlp_fc1", 40, 70, rank=6, seed=10, dtype=torch.float16)
    kernel = () if layout in ("lokr", "glora") else (3, 3)
    third, _ = sample(layout, "lora_unet_down_blocks_0_resnets_0_conv1", 16, 9, kernel=kernel, alpha=-1.0, seed=20)
    dora = {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": random(12, 1)}
    return save({**first, **second, **third, **dora, **carried}, folder, {"ss_network_dim": "4"}, name)


def kohya_file(path: Path, count: int = 6, power: float = 1.0, width: int = 48, rank: int = 16, convolutions: bool = True) -> Path:
    """A network in small with spectra that fall as 1 / i^power: U-Net and text encoder, linear layers and convolutions."""
    tensors: dict[str, Tensor] = {}
    for index in range(count):
        name = "lora_te_text_model_encoder_layers_{}_mlp_fc1" if index % 3 == 2 else "lora_unet_mid_block_attentions_{}_proj_in"
        kernel = (3, 3) if convolutions and index % 3 == 1 else ()
        pair, _ = sample(
            "kohya",
            name.format(index),
            width + 8 * index,
            width,
            rank,
            kernel,
            alpha=rank / 2,
            seed=100 * index,
            magnitude=0.5 ** (index % 4),
            power=power,
        )
        channel = torch.linspace(0.05, 1.5, width).view(1, -1, *[1] * len(kernel))  # some inputs matter more than others
        pair[f"{name.format(index)}.lora_down.weight"] *= channel
        tensors |= pair
    return save(tensors, path.parent, {"ss_network_dim": str(rank)}, path.name)


def packed_file(codec: str, source: Path, target: Path) -> Path:
    """A plain file compressed by one of CODECS."""
    values = CODECS[codec]
    report = compress_file(source, target, CompressionSettings.parse({"save_format": "packed", **values}))
    assert report.status == "written", codec
    return target


def relative_error(updates: Mapping[str, LowRankUpdate], exact: Mapping[str, Tensor]) -> float:
    """||dW - dW'|| / ||dW|| over dense updates; modules that are absent count as zero."""
    lost = sum(float((m - (dense(updates[n]) if n in updates else 0.0)).square().sum()) for n, m in exact.items())
    return (lost / sum(float(m.square().sum()) for m in exact.values())) ** 0.5


def dense_file(path: Path) -> dict[str, Tensor]:
    """Dense updates of a file, (out, in * kernel), float64."""
    with open_lora(path) as source:
        return {name: dense(source[name]) for name in source}
