"""Fake quantization: weights as the codec of the file will give them back, with a gradient as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import SettingsError
from ..quantization import CODECS, FixedFormat, encode_fixed
from ..quantization.grids import choose_static_scale, from_blocks, integer_steps, quantize_nf4, to_blocks
from ..settings import QuantizationSettings
from .entropy_grid import EntropyGrid

__all__ = ["FixedGrid", "Grid", "make_grid", "straight_through"]


class Grid(Protocol):
    """A quantizer of rows whose parameters are chosen now and then and kept in between."""

    def width(self, count: int) -> int:
        """Parameters that a row of `count` weights has."""

    def prepare(self, rows: Mapping[str, Sequence[Tensor]], current: Tensor) -> None:
        """Look at the whole network before parameters are chosen; `current`, flat, are those of before, zeros at first."""

    def choose(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Parameters (r, width) for rows (r, n) of down and of up."""

    def project(self, rows: Tensor, parameters: Tensor, key: Hashable) -> Tensor:
        """What a reader of the file gets for rows (r, n), float32, coded with these parameters; `key` is whose they are."""

    def forget(self) -> None:
        """Parameters have changed: what was derived from them, by key, is no longer true."""

    def spread(self, parameters: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Parameters of rows that are set side by side, zeros between: part i has rows of counts[i] weights."""

    def encode(self, rows: tuple[Tensor, Tensor], parameters: tuple[Tensor, Tensor]) -> tuple[str, dict[str, Any], list[bytes]]:
        """Codec, its parameters in the index, and chunks, of projected rows of down and up."""


class FixedGrid:
    """The integer codecs and NF4: the parameters of a row are the scales of its blocks, in float32.

    Args:
        settings: strategy dynamic, static or nf4.
    """

    def __init__(self, settings: QuantizationSettings) -> None:
        named = FixedFormat.of_settings(settings)
        self.form = FixedFormat(named.codec, named.block_size, named.static_scale, torch.float32)
        self.codec = CODECS[self.form.codec]
        self._levels = torch.tensor(self.codec.levels, dtype=torch.float32)

    def width(self, count: int) -> int:
        """ceil(count / block size)."""
        return -(-count // self.form.block_size) if self.form.block_size else 1

    def prepare(self, rows: Mapping[str, Sequence[Tensor]], current: Tensor) -> None:
        """Scales know nothing of each other."""

    def choose(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Scales by the codec's own search."""
        found = []
        for part in rows:
            blocks = to_blocks(part.float(), self.form.block_size)
            if self.form.static_scale is not None:
                found.append(choose_static_scale(blocks, self.codec.bits, self.form.static_scale, torch.float32))
            else:
                found.append(self.codec.choose_scale(blocks, torch.float32))
        return found

    def project(self, rows: Tensor, parameters: Tensor, key: Hashable) -> Tensor:
        """level * scale of the nearest code, in float32, as `Codec.decode` has it; no code is ever made."""
        blocks = to_blocks(rows.float(), self.form.block_size)
        if self.codec.name == "nf4":
            self._levels = self._levels.to(rows.device)
            steps = self._levels[quantize_nf4(blocks, parameters).int()]
        else:
            steps = integer_steps(blocks, parameters, self.codec.bits)
        return from_blocks(steps.mul_(parameters.unsqueeze(2)), rows.shape[1])

    def forget(self) -> None:
        """Nothing is derived from scales."""

    def spread(self, parameters: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Scales of 0 for blocks of zeros.

        Raises:
            SettingsError: a part begins within a block.
        """
        size = self.form.block_size
        if len(parameters) == 1 or size is None:
            return torch.cat(list(parameters))
        if any(count % size for count in counts[:-1]):
            raise SettingsError([f"qat=true with parts of {list(counts)} outputs: group_size={size} does not divide them"])
        total, offset, found = self.width(sum(counts)), 0, []
        for part in parameters:
            found.append(torch.nn.functional.pad(part, (offset, total - offset - part.shape[1])))
            offset += part.shape[1]
        return torch.cat(found)

    def encode(self, rows: tuple[Tensor, Tensor], parameters: tuple[Tensor, Tensor]) -> tuple[str, dict[str, Any], list[bytes]]:
        """Fixed-width codes, scales in float32. Projected weights lie on the grid: their codes are those they came from."""
        chunk = encode_fixed(rows[0], rows[1], self.form, scales=parameters)
        return self.form.codec, {"block": self.form.block_size or 0, "scales": "fp32"}, [chunk]


def make_grid(settings: QuantizationSettings) -> Grid:
    """The quantizer that the settings ask for."""
    return EntropyGrid(float(settings.bits or 0.0)) if settings.strategy == "entropy" else FixedGrid(settings)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def straight_through(weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(weight), with the gradient of the identity (Bengio et al., https://arxiv.org/abs/1308.3432).

    Weights beyond the last level keep their gradient too: the next search for scales brings them back onto the grid.
    """
    return _StraightThrough.apply(weight, function)
