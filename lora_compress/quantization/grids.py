"""Quantizers as pure functions: choose a scale, quantize, dequantize. Weights come in blocks that share a scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "FP8_LARGEST",
    "choose_absmax",
    "choose_fp8_scale",
    "choose_mse_scale",
    "choose_static_scale",
    "fp8_levels",
    "from_blocks",
    "integer_levels",
    "integer_steps",
    "quantize_fp8",
    "quantize_integer",
    "quantize_to_levels",
    "to_blocks",
]

# Fewest steps at which the largest weight of a block may lie. Every whole number from here to 2^(bits-1) is a candidate of
# the search, so that what was decoded is encoded again to the same values.
_LEAST_REACH = {2: 1, 3: 3, 4: 6, 5: 14, 6: 29, 8: 122}
_GROWTH = {2: 1.1, 3: 1.07, 4: 1.035, 5: 1.02, 6: 1.012, 8: 1.004}  # ratio of neighbouring candidates
_LARGE_BLOCK = 128  # weights above which single outliers can lie far beyond the grid
_REFINEMENTS = 2
FP8_LARGEST = 448.0  # of float8 e4m3
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
    return integer_steps(blocks, scale, bits).add_(2 ** (bits - 1)).to(torch.uint8)


def integer_steps(blocks: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest grid point of `scale: (r, b)` in steps, (r, b, g): -2^(bits-1) to 2^(bits-1) - 1."""
    half = 2 ** (bits - 1)
    return (blocks * _reciprocal(scale)).round_().clamp_(-half, half - 1)


def choose_mse_scale(blocks: Tensor, bits: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Scale (r, b) of about the least squared error: the best of some shrunken absmax scales, then refitted to its own codes.

    The grid reaches one step further on its negative side. Scales whose sign puts the largest weight there are tried first;
    up to 4 bits the other sign is tried too. For codes q of blocks x the best scale is <x, q> / <q, q>; two rounds of
    coding and refitting (Lloyd 1982, with the levels held at equal distances) follow the search.
    Scales are rounded to `dtype`, in which they are stored, before they are judged; all is done relative to the largest
    weight, so that squares neither vanish nor overflow.
    """
    search = _ScaleSearch(blocks, bits, dtype)
    reaches = torch.tensor(_reaches(bits, blocks.shape[2]), device=blocks.device)
    search.consider(search.extreme / reaches[:, None, None])
    for _ in range(_REFINEMENTS):
        search.consider(search.refitted().unsqueeze(0))
    return search.best


def choose_static_scale(blocks: Tensor, bits: int, scale: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Step (r, 1) = scale * RMS * 2^(8 - bits), at most the step of least squared error. One block is one component."""
    rms = blocks.square().mean(dim=2).sqrt()
    step = rms * (scale * 2.0 ** (8 - bits))
    optimal = choose_mse_scale(blocks, bits, dtype)
    return torch.where(step < optimal.abs(), _as_stored(step, dtype), optimal)


def choose_absmax(blocks: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Largest magnitude of each block, (r, b): the scale of NF4, not yet rounded to `dtype`, as bitsandbytes codes by it."""
    return blocks.abs().amax(dim=2)


def choose_fp8_scale(blocks: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Least power of two (r, b) that brings each block within e4m3's largest number, 448: nothing saturates."""
    mantissa, exponent = torch.frexp(blocks.abs().amax(dim=2) / FP8_LARGEST)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-126)
    return torch.where(mantissa > 0, torch.ldexp(torch.ones_like(mantissa), exponent), 0.0)


def fp8_levels() -> tuple[float, ...]:
    """The values of the 256 bytes as e4m3 floats (OCP 8-bit floating point, 2023; no infinity); 127 and 255 are NaN."""
    return tuple(torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().tolist())


def quantize_fp8(blocks: Tensor, scale: Tensor) -> Tensor:
    """Codes (r, b, g), uint8: the bytes of blocks / scale as e4m3 floats, ties to even."""
    fitted = (blocks * _reciprocal(scale)).clamp_(-FP8_LARGEST, FP8_LARGEST)
    return fitted.to(torch.float8_e4m3fn).view(torch.uint8)


def quantize_to_levels(blocks: Tensor, scale: Tensor, levels: Sequence[float]) -> Tensor:
    """Codes (r, b, g), uint8, of the rising level nearest to blocks / scale; with those of NF4 the codes of bitsandbytes."""
    values = torch.tensor(levels, dtype=torch.float32, device=blocks.device)
    return torch.bucketize((blocks * _reciprocal(scale)).contiguous(), (values[1:] + values[:-1]) / 2).to(torch.uint8)


class _ScaleSearch:
    """The best scale so far of each block, and its error; scales and errors count relative to the largest weight."""

    def __init__(self, blocks: Tensor, bits: int, dtype: torch.dtype) -> None:
        highest, lowest = blocks.amax(dim=2), blocks.amin(dim=2)
        self.bits = bits
        self.dtype = dtype
        self.extreme = torch.where(highest > -lowest, -highest, -lowest)  # the magnitude, with the sign of the scale
        self._inverse = _reciprocal(self.extreme)
        self._unit = blocks * self._inverse  # the largest weight is -1
        self._scratch = torch.empty_like(self._unit)
        self.best = torch.zeros_like(self.extreme)
        self._least = torch.full_like(self.extreme, float("inf"))

    def consider(self, scales: Tensor) -> None:
        """Take the best of `scales: (k, r, b)` where it is better than the best so far."""
        scales = _as_stored(scales, self.dtype)
        ratios = scales * self._inverse.squeeze(2)
        errors = torch.empty_like(scales)
        for inverse, error in zip(_reciprocal(ratios), errors, strict=True):
            steps, codes = self._codes(inverse)
            torch.linalg.vector_norm(steps.sub_(codes), dim=2, out=error)
        least, place = errors.mul_(ratios.abs()).min(dim=0)
        better = least < self._least
        self.best = torch.where(better, scales.gather(0, place.unsqueeze(0)).squeeze(0), self.best)
        self._least = torch.where(better, least, self._least)

    def refitted(self) -> Tensor:
        """The scale of least squares for the codes of the best scale; that scale again where the grid would be left unused."""
        steps, codes = self._codes(_reciprocal(self.best * self._inverse.squeeze(2)))
        product = torch.mul(codes, self._unit, out=steps).sum(dim=2)
        ratio = product / codes.square_().sum(dim=2)
        usable = ratio.abs() * (_LEAST_REACH[self.bits] - 0.5) <= 1.0  # False for the NaN of 0 / 0
        return torch.where(usable, ratio * self.extreme, self.best)

    def _codes(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in steps and the nearest codes, both (r, b, g); `inverse: (r, b, 1)` is the reciprocal of the scale."""
        half = 2 ** (self.bits - 1)
        steps = torch.mul(self._unit, inverse, out=self._scratch)
        return steps, steps.round().clamp_(-half, half - 1)


def _reaches(bits: int, block_size: int) -> list[float]:
    """Candidates for the number of steps at which the largest weight lies; negative for the scale of the other sign."""
    half, least, growth = 2 ** (bits - 1), _LEAST_REACH[bits], _GROWTH[bits]
    near = [half * growth**power for power in range(-2, 10)]
    whole = [float(steps) for steps in range(least, half + 1)]
    other_sign = [-reach for reach in near[::2]] if bits <= 4 else []
    far = [near[-1] * 1.2**power for power in range(1, 12)] if block_size > _LARGE_BLOCK else []
    return [*whole, *(reach for reach in near if reach >= least), *other_sign, *far]


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale for blocks, (..., r, b, 1); 0 where the block holds nothing."""
    return torch.where(scale.abs() >= _TINY, 1.0 / scale, 0.0).unsqueeze(-1)


def _as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, at most its largest number."""
    largest = torch.finfo(dtype).max
    return scale.clamp(-largest, largest).to(dtype).to(scale.dtype)
