"""Plain factors as every program reads them right: one alpha for a whole file, ranks of at least 2, no weight out of range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError
from ..files.dtypes import TensorSpec
from ..update import LowRankUpdate

__all__ = ["FP8", "KOHYA_KEYS", "PlainKeys", "exact_plain", "fp8_alpha", "plain_rows", "plain_update", "update_of_rows"]

FP8 = torch.float8_e4m3fn
_FP8_AMAX = 8.0  # e4m3 is as exact anywhere from 1 to 128; 8 keeps products of factors finite in fp16


@dataclass(frozen=True)
class PlainKeys:
    """The keys of one module in a plain file, with {} for its name.

    Args:
        down: such as {}.lora_down.weight.
        up: likewise.
        alpha: None in layouts that have none, where alpha = rank.
    """

    down: str
    up: str
    alpha: str | None

    @classmethod
    def of(cls, name: str, keys: Sequence[str]) -> PlainKeys:
        """Make the style of keys from those of one module: down, up and perhaps alpha."""
        down, up, *alpha = (key.replace(name, "{}", 1) if key.startswith(name) else key for key in keys)
        return cls(down, up, alpha[0] if alpha else None)

    def of_module(self, name: str) -> list[str]:
        """Return the keys of a module: down, up and perhaps alpha."""
        return [key.replace("{}", name, 1) for key in (self.down, self.up, self.alpha) if key is not None]

    def tensors(self, name: str, update: LowRankUpdate) -> dict[str, Tensor]:
        """Return the tensors of a module by key. In a layout without alpha the update's alpha must be its rank."""
        return self.factors(name, update) | self.alphas(name, update.alpha)

    def factors(self, name: str, update: LowRankUpdate) -> dict[str, Tensor]:
        """Return the two factors of a module by key."""
        return {self.down.replace("{}", name, 1): update.down, self.up.replace("{}", name, 1): update.up}

    def alphas(self, name: str, alpha: float) -> dict[str, Tensor]:
        """Return the alpha tensor of a module by key; nothing for layouts without alpha."""
        return {} if self.alpha is None else {self.alpha.replace("{}", name, 1): torch.tensor(alpha, dtype=torch.float32)}

    def specs(self, name: str, down: tuple[int, ...], up: tuple[int, ...], dtype: torch.dtype | None) -> dict[str, TensorSpec]:
        """Return types and shapes of a module's tensors by key, for factors of these shapes."""
        shapes = {self.down: down, self.up: up}
        specs = {key.replace("{}", name, 1): TensorSpec(dtype or torch.float32, shape) for key, shape in shapes.items()}
        return specs | ({self.alpha.replace("{}", name, 1): TensorSpec(torch.float32, ())} if self.alpha is not None else {})


KOHYA_KEYS = PlainKeys("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha")


def plain_update(
    down: Tensor, up: Tensor, kernel: tuple[int, ...], dtype: torch.dtype, alpha: float | None = 1.0, least_rank: int = 2
) -> LowRankUpdate:
    """Return the update up^T down with the factors and the alpha that a plain file gets; arguments and errors as `plain_rows`.

    Args:
        kernel: kernel size of a convolution, () for a linear layer.
    """
    (down,), (up,) = plain_rows(down.unsqueeze(0), up.unsqueeze(0), dtype, alpha, least_rank)
    return update_of_rows(down, up, kernel, alpha)


def update_of_rows(down: Tensor, up: Tensor, kernel: tuple[int, ...], alpha: float | None) -> LowRankUpdate:
    """Return the update up^T down of rows (rank, in * kernel) and (rank, out); alpha None means alpha = rank."""
    return LowRankUpdate.from_matrices(down, up.T.contiguous(), float(len(down)) if alpha is None else alpha, kernel)


def plain_rows(
    down: Tensor, up: Tensor, dtype: torch.dtype, alpha: float | None = 1.0, least_rank: int = 2
) -> tuple[Tensor, Tensor]:
    """Return the rows of a plain file's factors, down (b, rank, in * kernel) and up^T (b, rank, out), of b modules of one shape.

    The scale of a module goes into its factors, half into each, because diffusers mixes up alphas that differ between
    modules; stable-diffusion.cpp misreads rank 1, so components of zeros fill the rank up to `least_rank`.

    Args:
        down: (b, k, in * kernel), rows of the balanced basis.
        up: (b, k, out).
        dtype: of the factors in the file.
        alpha: of the file; None where the layout has none, which means alpha = rank.
        least_rank: to pad to.

    Raises:
        FormatError: weights beyond the range of `dtype`.
    """
    rank = max(down.shape[1], least_rank)
    gain = 1.0 if alpha is None else math.sqrt(rank / alpha)
    largest = [_largest(rows) for rows in (down, up)]
    balances = [_power_of_two_balance(*pair) for pair in zip(*(most.tolist() for most in largest), strict=True)]
    scales = [gain * balance for balance in balances], [gain / balance for balance in balances]
    rows = []
    for factor, most, scale in zip((down, up), largest, map(down.new_tensor, scales), strict=True):
        top = (most * scale).to(dtype)  # rounding keeps order, and NaN
        if not bool(torch.isfinite(top.float()).all()):
            raise FormatError(f"weights up to {float((most * scale).max()):.3g} do not fit {dtype}: save as float32")
        scaled = factor * scale[:, None, None]
        missing = rank - scaled.shape[1]
        rows.append((torch.nn.functional.pad(scaled, (0, 0, 0, missing)) if missing else scaled).to(dtype))
    return rows[0], rows[1]


def exact_plain(update: LowRankUpdate, dtype: torch.dtype, least_rank: int = 2) -> LowRankUpdate:
    """Return an update whose factors are only cast: alpha / rank stays, and zeros fill the rank up to `least_rank`."""
    missing = max(least_rank - update.rank, 0)
    down = torch.nn.functional.pad(update.down_matrix, (0, 0, 0, missing)).to(dtype)
    up = torch.nn.functional.pad(update.up_matrix, (0, missing)).to(dtype)
    return LowRankUpdate.from_matrices(down, up, update.scale * (update.rank + missing), update.kernel)


def fp8_alpha(products: list[float]) -> float:
    """Return the smallest power of two with sqrt(product / alpha) at most 8 for every module: it keeps fp16 products finite.

    Args:
        products: rank max|down| max|up| of each module.
    """
    largest = max(products, default=0.0)
    if largest == 0.0:
        return 1.0
    if not largest <= 2.0**127 * _FP8_AMAX**2:
        raise FormatError(
            f"the product of a module's largest weights is {largest:.3g}, allowed in fp8: {2.0**127 * _FP8_AMAX**2:.3g}: "
            "use save_format=packed, or kohya with --save_precision float"
        )
    return 2.0 ** min(max(math.ceil(math.log2(largest / _FP8_AMAX**2)), -126), 127)  # alpha is stored in float32


def _largest(rows: Tensor) -> Tensor:
    """Return max|rows| of each matrix, (b,); NaN where a matrix holds NaN."""
    return torch.maximum(rows.amax(dim=(1, 2)), -rows.amin(dim=(1, 2))) if rows.numel() else rows.new_zeros(len(rows))


def _power_of_two_balance(largest_down: float, largest_up: float) -> float:
    """Return c = 2^k for which c max|down| and max|up| / c are closest; multiplying by a power of two costs no precision."""
    if not (0.0 < largest_down < math.inf and 0.0 < largest_up < math.inf):
        return 1.0
    return 2.0 ** round(0.5 * math.log2(largest_up / largest_down))
