"""Small random updates and their dense matrices, made without the code under test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_compress import LowRankUpdate


def random_update(
    rank: int = 4,
    inputs: int = 20,
    outputs: int = 24,
    kernel: tuple[int, ...] = (),
    alpha: float | None = None,
    seed: int = 0,
    magnitude: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> LowRankUpdate:
    """Gaussian factors; alpha is the rank unless given."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, *kernel, generator=generator) * magnitude
    up = torch.randn(outputs, rank, *([1] * len(kernel)), generator=generator) * magnitude
    return LowRankUpdate(down.to(dtype), up.to(dtype), float(rank) if alpha is None else alpha)


def update_of_spectrum(sigma: Sequence[float], inputs: int = 24, outputs: int = 20, seed: int = 0) -> LowRankUpdate:
    """A linear update with these singular values, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    rank = len(sigma)
    v = torch.linalg.qr(torch.randn(inputs, rank, generator=generator, dtype=torch.float64))[0].T
    u = torch.linalg.qr(torch.randn(outputs, rank, generator=generator, dtype=torch.float64))[0]
    return LowRankUpdate((torch.tensor(sigma).double().unsqueeze(1) * v).float(), u.float(), float(rank))


def mixed_updates(rank: int = 8, seed: int = 0) -> dict[str, LowRankUpdate]:
    """A network in small: linear layers and convolutions of the U-Net and of a text encoder, with falling spectra, alpha 3."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (96, 150, ()),
        "lora_unet_mid_block_attentions_0_proj_in": (64, 64, (1, 1)),
        "lora_unet_down_blocks_0_resnets_0_conv1": (16, 40, (3, 3)),
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (101, 77, ()),
    }
    updates = {}
    for index, (name, (inputs, outputs, kernel)) in enumerate(shapes.items()):
        falling = torch.exp(-0.4 * torch.arange(rank)) * 0.5 ** (index + 2)
        down = torch.randn(rank, inputs, *kernel, generator=generator) * falling.view(-1, *([1] * (1 + len(kernel))))
        up = torch.randn(outputs, rank, *([1] * len(kernel)), generator=generator)
        updates[name] = LowRankUpdate(down, up, 3.0)
    return updates


def dense(update: LowRankUpdate) -> Tensor:
    """(alpha / r) up @ down, (out, in * kernel), float64."""
    return (
        update.alpha / max(len(update.down), 1) * torch.einsum("or...,rk->ok", update.up.double(), update.down.double().flatten(1))
    )


def dense_error(before: dict[str, LowRankUpdate], after: dict[str, LowRankUpdate]) -> float:
    """||dW - dW'|| / ||dW|| over all modules; a module that is absent afterwards counts as zero."""
    matrices = {name: dense(update) for name, update in before.items()}
    lost = sum(float((m - (dense(after[name]) if name in after else 0)).square().sum()) for name, m in matrices.items())
    return (lost / sum(float(m.square().sum()) for m in matrices.values())) ** 0.5
