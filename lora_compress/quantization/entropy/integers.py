"""A module's factors as integers: the step before the entropy coder, and the step after its decoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...errors import NOT_FINITE, FormatError, SettingsError
from .reconstruction import Model, row_weights
from .symbols import MAX_VALUE, as_symbols, as_values
from .table_choice import choose_models, row_bits

__all__ = [
    "QuantizedModule",
    "as_array",
    "module_gains",
    "quantize_module",
    "quantize_rows",
    "restore_module",
    "restore_rows",
    "row_units",
    "side_rows",
    "with_models",
]

# 2^(j / 8), written out so that every platform has the same.
_EIGHTHS = np.array(
    [
        1.0,
        1.0905077326652577,
        1.189207115002721,
        1.2968395546510096,
        1.4142135623730951,
        1.5422108254079407,
        1.681792830507429,
        1.8340080864093424,
    ]
)
_END_BITS = 30  # what the coder's last state costs beyond the symbols' own bits, and whole bytes


@dataclass(frozen=True)
class QuantizedModule:
    """Integers of both factors and the models of their rows: all that is coded.

    Args:
        gains: (k,), eighths of octaves e: rows are multiplied by 2^(e / 8) before they are divided by the step size.
        values: integers of down (k, n) and up (k, m), int32.
        scales: (k,) of down and of up: indices of scale.
        shapes: (k,) of down and of up: indices of shape.
        bits: (k,) of down and of up: lengths of the rows' code.
        kept: (k,), which components of the input these are.
    """

    gains: np.ndarray
    values: tuple[np.ndarray, np.ndarray]
    scales: tuple[np.ndarray, np.ndarray]
    shapes: tuple[np.ndarray, np.ndarray]
    bits: tuple[np.ndarray, np.ndarray]
    kept: np.ndarray

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.gains)

    def taken(self, chosen: np.ndarray) -> QuantizedModule:
        """Its components of these numbers (p,), in this order."""
        pairs = [(down[chosen], up[chosen]) for down, up in (self.values, self.scales, self.shapes, self.bits)]
        return QuantizedModule(self.gains[chosen], pairs[0], pairs[1], pairs[2], pairs[3], self.kept[chosen])

    @cached_property
    def side(self) -> tuple[list[np.ndarray], list[int], list[int]]:
        """What is told of the rows, as three rows of integers, and the scales and shapes of the tables that code them."""
        rows = side_rows(self)
        models = [choose_models(row[None], symbols_only=True) for row in rows]
        return rows, [int(model[0][0]) for model in models], [int(model[1][0]) for model in models]

    @cached_property
    def payload_bits(self) -> float:
        """Bits that its payload of one stage takes."""
        if not self.rank:
            return 0.0
        side = sum(8.0 + row_bits(*described) for described in zip(*self.side, strict=True))
        return float(self.bits[0].sum() + self.bits[1].sum()) + side + _END_BITS


def quantize_module(down: Tensor, up: Tensor, step_size: float) -> QuantizedModule:
    """Return the integers of a module's rows, without the components of which a factor rounds to zero."""
    if not (step_size > 0 and np.isfinite(step_size)):
        raise SettingsError([f"step size = {step_size}: a positive number is needed"])
    factors = as_array(down), as_array(up)
    kept, gains = module_gains(*factors)
    values = [quantize_rows(factor[kept], gains, step_size) for factor in factors]
    return with_models(gains, values[0], values[1], kept)


def module_gains(down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components (p,) that are not zero, and their gains (p,): round(4 log2 sigma), sigma = ||down_i|| ||up_i||.

    Raises:
        FormatError: a factor holds NaN or infinity.
    """
    norms = [np.sqrt(np.einsum("ij,ij->i", factor, factor, dtype=np.float64)) for factor in (down, up)]
    sigma = norms[0] * norms[1]
    if not np.isfinite(sigma).all():
        raise FormatError(NOT_FINITE)
    kept = np.flatnonzero(sigma > 0)
    return kept, np.rint(4 * np.log2(sigma[kept])).astype(np.int64)


def quantize_rows(rows: np.ndarray, gains: np.ndarray, step_size: float) -> np.ndarray:
    """round(row 2^(e/8) / step size), int32, of rows (k, n) with gains e (k,)."""
    scaled = rows * (np.exp2(gains / 8) / step_size).astype(np.float32)[:, None]
    largest = np.abs(scaled).max(initial=0)
    if not largest <= MAX_VALUE:
        raise SettingsError(
            [f"step size = {step_size}: the largest weight is {largest:.3g} steps, 2^28 are possible; take a larger step size"]
        )
    return np.rint(scaled, out=scaled).astype(np.int32)


def with_models(gains: np.ndarray, down: np.ndarray, up: np.ndarray, kept: np.ndarray) -> QuantizedModule:
    """A module of integers down (k, n) and up (k, m) with the cheapest model of each row, without those half of which is zero."""
    alive = np.flatnonzero(down.any(axis=1) & up.any(axis=1))
    if len(alive) < len(gains):
        gains, down, up, kept = gains[alive], down[alive], up[alive], kept[alive]
    found = [choose_models(values) for values in (down, up)]
    return QuantizedModule(
        gains, (down, up), (found[0][0], found[1][0]), (found[0][1], found[1][1]), (found[0][2], found[1][2]), kept
    )


def side_rows(module: QuantizedModule) -> list[np.ndarray]:
    """What is told of the rows, as three rows of integers: gains, scales less what the gains predict, shapes."""
    gains = np.diff(module.gains, prepend=0)
    scales = []
    for scale in module.scales:
        offset = scale - 2 * module.gains
        middle = np.sort(offset)[len(offset) // 2]
        scales += [[middle], offset - middle]
    shapes = np.concatenate(module.shapes)
    return [gains, np.concatenate(scales), as_values(shapes)]


def row_units(gains: np.ndarray, step_size: float) -> np.ndarray:
    """Return step size * 2^(-e / 8), float64, for gains e (k,): the weight that the integer 1 of each row stands for."""
    return np.ldexp(step_size * _EIGHTHS[-gains % 8], -gains // 8)


def restore_module(module: QuantizedModule, step_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows down (rank, n) and up (rank, m), float32, as the decoder makes them of a whole payload."""
    units = row_units(module.gains, step_size)
    down, up = (restore_rows(*part, units) for part in zip(module.values, module.scales, module.shapes, strict=True))
    return down, up


def restore_rows(values: np.ndarray, scales: np.ndarray, shapes: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Weights (k, n), float32, of integers (k, n) with the models and units of their rows, each (k,)."""
    models = [Model(scale, shape, 0) for scale, shape in zip(scales.tolist(), shapes.tolist(), strict=True)]
    begins = np.arange(len(values)) * values.shape[1]
    widths = np.full(len(values), values.shape[1])
    return row_weights(as_symbols(values).ravel(), begins, widths, models, units).reshape(values.shape)


def as_array(rows: Tensor) -> np.ndarray:
    """float32, on the host."""
    return rows.detach().to("cpu", torch.float32).contiguous().numpy()
