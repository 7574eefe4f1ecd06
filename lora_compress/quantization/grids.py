"""Quantizers as pure functions: choose a scale, quantize, dequantize. Weights come in blocks that share a scale."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "NF4_LEVELS",
    "choose_absmax",
    "choose_mse_scale",
    "choose_static_scale",
    "from_blocks",
    "integer_levels",
    "quantize_integer",
    "quantize_nf4",
    "to_blocks",
]

# Quantiles of a standard normal, scaled to [-1, 1]: QLoRA (arXiv 2305.14314), the values of bitsandbytes' kernels.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Candidates for the number of steps at which the largest weight lies, 2^(bits-1) - 1 and 2^(bits-1) among them: with these
# two, what was decoded is encoded again to the same values.
_REACHES = {4: (7, 7.5, 8, 8.5, 9, 9.5, 10.5, 11.5, 12.5, 14), 8: (127, 128, 134, 142)}
_TINY = torch.finfo(torch.float32).tiny  # smaller scales have no finite reciprocal


def to_blocks(rows: Tensor, block_size: int | None) -> Tensor:
    """Cut rows (r, n) into blocks (r, b, g) that share a scale; the last block of a row is padded with zeros.

    `block_size` None takes a whole row as one block.
    """
    if block_size is None or block_size >= rows.shape[1]:
        return rows.unsqueeze(1)
    padding = -rows.shape[1] % block_size
    return torch.nn.functional.pad(rows, (0, padding)).unflatten(1, (-1, block_size))


def from_blocks(blocks: Tensor, count: int) -> Tensor:
    """Undo `to_blocks`: (r, b, g) to (r, count)."""
    return blocks.flatten(1)[:, :count]


def integer_levels(bits: int) -> list[float]:
    """The values of the codes 0 .. 2^bits - 1 of a symmetric integer grid, -2^(bits-1) .. 2^(bits-1) - 1, in steps."""
    half = 2 ** (bits - 1)
    return [float(code - half) for code in range(2 * half)]


def quantize_integer(blocks: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes (r, b, g), uint8, of the nearest grid point of `scale: (r, b)`; scale 0 gives the code of zero."""
    half = 2 ** (bits - 1)
    return (blocks * _reciprocal(scale)).round().clamp(-half, half - 1).add(half).to(torch.uint8)


def choose_mse_scale(blocks: Tensor, bits: int) -> Tensor:
    """Scale (r, b) with the least squared error among shrunken absmax scales.

    The grid reaches one step further on its negative side, so the scale has the sign that puts the largest weight there.
    Scales are rounded to bfloat16, in which they are stored, before they are judged; errors are taken relative to the
    largest weight, so that their squares neither vanish nor overflow.
    """
    largest, smallest = blocks.amax(dim=2), blocks.amin(dim=2)
    extreme = torch.where(largest > -smallest, -largest, -smallest)  # the magnitude, with the sign of the scale
    inverse = _reciprocal(extreme)
    unit = blocks * inverse  # the largest weight is -1
    best = torch.zeros_like(extreme)
    least = torch.full_like(extreme, float("inf"))
    for reach in _REACHES[bits]:
        scale = _as_stored(extreme / reach)
        error = (_snap(unit, scale * inverse.squeeze(2), bits) - unit).square_().sum(dim=2)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def choose_static_scale(blocks: Tensor, bits: int, scale: float) -> Tensor:
    """Step (r, 1) = scale * RMS * 2^(8 - bits), at most the step of least squared error. One block is one component."""
    rms = blocks.square().mean(dim=2).sqrt()
    step = rms * (scale * 2.0 ** (8 - bits))
    optimal = choose_mse_scale(blocks, bits)
    return torch.where(step < optimal.abs(), _as_stored(step), optimal)


def choose_absmax(blocks: Tensor) -> Tensor:
    """Largest magnitude of each block, (r, b): the scale of NF4."""
    return blocks.abs().amax(dim=2)


def quantize_nf4(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Codes (r, b, g), uint8, of the nearest NF4 level of blocks / absmax: those of bitsandbytes' quantize_4bit."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=blocks.device)
    return torch.bucketize((blocks * _reciprocal(absmax)).contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _snap(blocks: Tensor, scale: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return (blocks * _reciprocal(scale)).round_().clamp_(-half, half - 1).mul_(scale.unsqueeze(2))


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale for blocks, (r, b, 1); 0 where the block holds nothing."""
    return torch.where(scale.abs() >= _TINY, 1.0 / scale, 0.0).unsqueeze(2)


def _as_stored(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).to(scale.dtype)
