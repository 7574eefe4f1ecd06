"""Fake quantization of the entropy codec for training: one step size for the file, weights where the decoder will put them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...parallel import each_module
from .codec import encode_integers
from .integers import QuantizedModule, as_array, quantize_rows, restore_rows, row_units
from .table_choice import choose_models

__all__ = ["CODEC_NAME", "EntropyFakeQuantizer"]

CODEC_NAME = "entropy"  # in the index of packed files

_PARAMETERS = 6  # gain, scale, shape, limit, multiplier and step size of a row
_ATTEMPTS = 8  # at the first step size; later searches correct it once each
_CLOSE = 0.01  # bits per weight
_LEAST_SIGMA = 1e-9  # of the strongest component: below, the gain no longer follows
_ROOM = 16  # integers beyond the largest of a row that weights may reach until the next search


class EntropyFakeQuantizer:
    """Rounds rows to q = round(row 2^(e/8) / step size) and back to the centre of mass of the cell, as `integers` does.

    Gains e, tables and the step size are chosen from the weights now and then. In between, integers are kept within the largest
    that a row had, and a little more.

    Args:
        bits: average per weight that the step size is chosen for.
    """

    def __init__(self, bits: float) -> None:
        self.bits = bits
        self._step_size: float | None = None
        self._tables: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def width(self, count: int) -> int:
        """Return the number of parameters of any row."""
        return _PARAMETERS

    def prepare(self, rows: Mapping[str, Sequence[Tensor]], current: Tensor) -> None:
        """Choose the step size of the whole network.

        A doubled step size lowers the rate by one bit per weight, except for weights that are zero already: each attempt corrects
        the step size by that rule.

        Args:
            rows: (r, n) of down and of up, by module name.
            current: flat, the parameters from before; zeros the first time.
        """
        step_size = float(current[-1])
        attempts = 1 if step_size else _ATTEMPTS
        weights = sum(part.numel() for parts in rows.values() for part in parts)
        if not step_size:
            squares = sum(float(part.double().square().sum()) for parts in rows.values() for part in parts)
            step_size = max((squares / max(weights, 1)) ** 0.5, 1e-12) ** 2 * 4.0 ** (1.0 - self.bits)
        for _ in range(attempts):
            used = sum(each_module(_bits_at(step_size), rows).values()) / max(weights, 1)
            if abs(used - self.bits) < _CLOSE:
                break
            step_size *= 2.0 ** max(min((used - self.bits) / min(max(self.bits, 0.25), 1.0), 6.0), -6.0)
        self._step_size = float(np.float32(step_size))

    def choose(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return gains and tables for the step size that `prepare` found."""
        assert self._step_size is not None
        module, gains = _quantized(rows, self._step_size)
        found = []
        for values, scales, shapes, part in zip(module.values, module.scales, module.shapes, rows, strict=True):
            largest = np.abs(values).max(axis=1, initial=0)
            limit = np.minimum(2 * largest, largest + _ROOM) + 1
            multiplier = (np.exp2(gains / 8) / self._step_size).astype(np.float32)
            columns = [gains, scales, shapes, limit, multiplier, np.full(len(gains), self._step_size)]
            found.append(torch.from_numpy(np.stack(columns, axis=1).astype(np.float32)).to(part.device))
        return found

    def project(self, rows: Tensor, parameters: Tensor, key: Hashable) -> Tensor:
        """Return the weights that a decoder makes of rows (r, n); `key` is whose rows they are, until `forget`."""
        if key not in self._tables:
            table, middle = _table(parameters)
            self._tables[key] = table.to(rows.device), middle.to(rows.device)
        table, middle = self._tables[key]
        limit = parameters[:, 3:4]
        steps = (rows.float() * parameters[:, 4:5]).round_().clamp_(-limit, limit)
        return table[steps.long() + middle.unsqueeze(1)]

    def forget(self) -> None:
        """Drop the tables: the parameters have changed."""
        self._tables.clear()

    def spread(self, parameters: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Return the parameters one after the other: zero is zero at any step size."""
        return torch.cat(list(parameters))

    def encode(self, rows: tuple[Tensor, Tensor], parameters: tuple[Tensor, Tensor]) -> tuple[str, dict[str, Any], list[bytes]]:
        """Return the integers that projected rows came from, coded with the gains and tables they were projected with."""
        values, scales, shapes = [], [], []
        for part, own in zip(rows, parameters, strict=True):
            table, middle = _table(own)
            integers = np.empty(tuple(part.shape), dtype=np.int32)
            for i, (centre, limit) in enumerate(zip(middle.tolist(), own[:, 3].int().tolist(), strict=True)):
                row = table[centre - limit : centre + limit + 1]  # rising
                integers[i] = (torch.searchsorted(row, part[i].contiguous()) - limit).numpy()
            values.append(integers)
            scales.append(own[:, 1].numpy().astype(np.int64))
            shapes.append(own[:, 2].numpy().astype(np.int64))
        gains, step_size = parameters[0][:, 0].numpy().astype(np.int64), float(parameters[0][0, 5])
        nothing = np.zeros(len(gains))
        kept = np.arange(len(gains))
        module = QuantizedModule(
            gains, (values[0], values[1]), (scales[0], scales[1]), (shapes[0], shapes[1]), (nothing, nothing), kept
        )
        return CODEC_NAME, {"step": step_size, "layers": 1}, encode_integers(module, step_size).chunks


def _quantized(rows: Sequence[Tensor], step_size: float) -> tuple[QuantizedModule, np.ndarray]:
    """Integers and models of all rows, of those too that are zero, and their gains."""
    down, up = (as_array(part) for part in rows)
    norms = [np.sqrt(np.einsum("ij,ij->i", part, part, dtype=np.float64)) for part in (down, up)]
    sigma = norms[0] * norms[1]
    sigma = np.maximum(sigma, max(sigma.max(initial=0.0) * _LEAST_SIGMA, 1e-30))
    gains = np.rint(4 * np.log2(sigma)).astype(np.int64)
    values = [quantize_rows(part, gains, step_size) for part in (down, up)]
    models = [choose_models(part) for part in values]
    scales, shapes, bits = zip(*models, strict=True)
    kept = np.arange(len(gains))
    return QuantizedModule(gains, (values[0], values[1]), scales, shapes, bits, kept), gains


def _bits_at(step_size: float) -> Callable[[str, Sequence[Tensor]], float]:
    """Bits of the rows of a module, without those that a zero in the other factor makes useless."""

    def bits(name: str, rows: Sequence[Tensor]) -> float:
        module, _ = _quantized(rows, step_size)
        alive = module.values[0].any(axis=1) & module.values[1].any(axis=1)
        return float(sum(side[alive].sum() for side in module.bits))

    return bits


def _table(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """What each integer from -limit to limit of each row stands for, float32, one after the other; the places of the zeros."""
    columns = parameters.double().cpu().numpy()
    gains, scales, shapes, limits = (columns[:, i].astype(np.int64) for i in range(4))
    units = row_units(gains, float(columns[0, 5])) if len(columns) else np.zeros(0)
    pieces = []
    for i, limit in enumerate(limits.tolist()):
        integers = np.arange(-limit, limit + 1, dtype=np.int32)[None]
        pieces.append(restore_rows(integers, scales[i : i + 1], shapes[i : i + 1], units[i : i + 1])[0])
    sizes = 2 * limits + 1
    middle = np.cumsum(sizes) - sizes + limits
    return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *pieces])), torch.from_numpy(middle)
