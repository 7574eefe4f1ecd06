"""In which precision the factors of a plain file are stored, where nobody has named one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SettingsError
from ..layouts.plain import FP8
from ..programs.table import ConsumerRules, PlannedFile
from ..settings import CompressionSettings
from ..sources import LoraSource
from .encode import Encoder

__all__ = ["PLAIN_NOISE", "Factors", "budget_precisions", "file_precision", "file_precisions", "half_precision", "usual_precision"]

_STORABLE = (torch.float16, torch.bfloat16, torch.float32)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
# Squared relative error of an update that rounding both of its factors causes.
PLAIN_NOISE = {torch.float16: 1e-7, torch.bfloat16: 6e-6, FP8: 1.5e-3}
_SPACING = 2.0**-24  # between neighbouring float16 numbers below 6.1e-5, where they lose digits
_FP8_WITHOUT_ALPHA = (
    "save_format=fp8 needs an alpha beside its factors, which brings small weights into the range of 8-bit floats, and {} files "
    "have none: use save_format=packed with bits=8, which is as small, or save_format=kohya with save_precision=fp16 and a "
    "smaller rank"
)


class Factors(NamedTuple):
    """What decides whether the factors of a module fit float16.

    Args:
        sigma: (k,) singular values of the update, falling.
        sizes: (inputs * kernel, outputs).
    """

    sigma: Tensor
    sizes: tuple[int, int]


def usual_precision(dtype: torch.dtype, float8: bool) -> torch.dtype:
    """Return the precision of a plain file made from one of `dtype`, without a budget: that of the input where programs read it.

    Args:
        float8: whether the file can be one of 8-bit floats, which needs an alpha beside the factors.
    """
    if dtype in _FLOAT8 and float8:
        return FP8
    return dtype if dtype in _STORABLE else torch.float16


def budget_precisions(dtype: torch.dtype, factors: Iterable[Factors], float8: bool) -> tuple[torch.dtype, ...]:
    """Return the precisions to try for a size or an error, best first; each next one only where the error is not reached before.

    A file of 32-bit floats becomes one of 16 bits: half the bytes cost an error of 0.03 %. Files of 16 and of 8 bits keep their
    precision, but for float16 where `half_precision` says that it does not hold the weights.
    """
    usual, half = usual_precision(dtype, float8), half_precision(factors)
    if usual == FP8:
        return FP8, half
    if usual == torch.float16:
        return (half,)
    return (half, torch.float32) if usual == torch.float32 else tuple(dict.fromkeys((torch.bfloat16, half)))


def half_precision(factors: Iterable[Factors]) -> torch.dtype:
    """Return float16, or bfloat16 where float16 would overflow, or lose more to underflow than bfloat16 loses to rounding.

    The rows of a component with the singular value s have the norm sqrt(s r), r being the rank, because plain files have alpha 1.
    A weight below 6.1e-5 is rounded by up to half of 2^-24, that is by 2^-24 / sqrt(12) in the root mean square; over n weights of
    each row the product changes by the share 2 n (2^-24)^2 / (12 s r) of its square.
    """
    lost = total = 0.0
    for sigma, (inputs, outputs) in factors:
        sigma, rank = sigma.double(), len(sigma)
        if rank and float(sigma[0]) * rank * 2 >= torch.finfo(torch.float16).max ** 2:
            return torch.bfloat16
        squares, width = sigma.square(), (inputs * outputs) ** 0.5
        lost += float(torch.minimum(sigma * (2 * width * _SPACING**2 / (12 * max(rank, 1))), squares).sum())
        total += float(squares.sum())
    return torch.bfloat16 if lost > PLAIN_NOISE[torch.bfloat16] * total else torch.float16


def file_precision(lora: LoraSource, settings: CompressionSettings, named: torch.dtype | None, rules: ConsumerRules) -> torch.dtype:
    """Return the precision of plain factors without a budget.

    Args:
        lora: the input.
        settings: save_format fp8 decides by itself.
        named: the precision that was asked for, None if it was left open.
        rules: of the programs that must be able to load a plain file.

    Raises:
        SettingsError: fp8 was asked for, and the layout has no alpha.
    """
    if settings.save_format == "fp8":
        if not _has_alpha(lora):
            raise SettingsError([_FP8_WITHOUT_ALPHA.format(lora.layout)], str(lora.path))
        return FP8
    return named or usual_precision(lora.dtype, settings.save_format == "kohya" and _takes_float8(lora, rules))


def _has_alpha(lora: LoraSource) -> bool:
    return all(lora.plain_keys(name).alpha is not None for name in lora)


def _takes_float8(lora: LoraSource, rules: ConsumerRules) -> bool:
    """Whether a plain file of 8-bit floats can be made of this one, and the programs that are asked for load it."""
    file = PlannedFile("fp8", FP8, lora.layout, lora.family, {}, ())
    return _has_alpha(lora) and not rules.problems(file)


def file_precisions(lora: LoraSource, encoder: Encoder, rules: ConsumerRules) -> tuple[torch.dtype, ...]:
    """Return the precisions of a plain file to try, where none was named; see `budget_precisions`."""
    settings = encoder.settings
    if encoder.packed or settings.save_format == "fp8" or not settings.budget.enabled:
        return (encoder.dtype,)
    factors = (Factors(analysis.spectrum.sigma, analysis.shape.stored) for analysis in encoder.components.values())
    return budget_precisions(lora.dtype, factors, _takes_float8(lora, rules))
