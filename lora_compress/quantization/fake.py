"""Fake quantization for training: weights as the codec of the file will give them back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import SettingsError
from .codecs import CODECS
from .fixed import FixedFormat, encode_fixed
from .grids import choose_static_scale, from_blocks, to_blocks

__all__ = ["FakeQuantizer", "FixedFakeQuantizer"]


class FakeQuantizer(Protocol):
    """A quantizer of rows whose parameters are chosen now and then and kept in between."""

    def width(self, count: int) -> int:
        """Return the number of parameters that a row of `count` weights has."""

    def prepare(self, rows: Mapping[str, Sequence[Tensor]], current: Tensor) -> None:
        """Look at the whole network before parameters are chosen.

        Args:
            rows: (r, n) of down and of up, by module name.
            current: flat, the parameters from before; zeros the first time.
        """

    def choose(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return parameters (r, width) for rows (r, n) of down and of up."""

    def project(self, rows: Tensor, parameters: Tensor, key: Hashable) -> Tensor:
        """Return what a reader of the file gets for rows (r, n), float32, coded with these parameters; `key` is whose they are."""

    def forget(self) -> None:
        """Drop what was derived from parameters by key: they have changed."""

    def spread(self, parameters: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Return the parameters of rows that are set side by side, zeros between: part i has rows of counts[i] weights."""

    def encode(self, rows: tuple[Tensor, Tensor], parameters: tuple[Tensor, Tensor]) -> tuple[str, dict[str, Any], list[bytes]]:
        """Return codec name, its parameters in the index, and chunks, of projected rows of down and up."""


class FixedFakeQuantizer:
    """The fake quantizer of fixed-width codes: the parameters of a row are the scales of its blocks, in float32.

    Args:
        stored: how the file stores the rows.
    """

    def __init__(self, stored: FixedFormat) -> None:
        self.form = FixedFormat(stored.codec, stored.block_size, stored.static_scale, torch.float32)
        self.codec = CODECS[self.form.codec]
        self._levels = torch.tensor(self.codec.levels, dtype=torch.float32)

    def width(self, count: int) -> int:
        """Return ceil(count / block size)."""
        return -(-count // self.form.block_size) if self.form.block_size else 1

    def prepare(self, rows: Mapping[str, Sequence[Tensor]], current: Tensor) -> None:
        """Do nothing: scales do not depend on each other."""

    def choose(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the scales that the codec's own search finds."""
        found = []
        for part in rows:
            blocks = to_blocks(part.float(), self.form.block_size)
            if self.form.static_scale is not None:
                found.append(choose_static_scale(blocks, self.codec.bits, self.form.static_scale, torch.float32))
            else:
                found.append(self.codec.choose_scale(blocks, torch.float32))
        return found

    def project(self, rows: Tensor, parameters: Tensor, key: Hashable) -> Tensor:
        """Return level * scale of the nearest code, in float32, as `Codec.decode` has it."""
        blocks = to_blocks(rows.float(), self.form.block_size)
        if self.codec.nearest is not None:
            levels = self.codec.nearest(blocks, parameters)
        else:
            self._levels = self._levels.to(rows.device)
            levels = self._levels[self.codec.quantize(blocks, parameters).int()]
        return from_blocks(levels.mul_(parameters.unsqueeze(2)), rows.shape[1])

    def forget(self) -> None:
        """Do nothing: nothing is derived from scales."""

    def spread(self, parameters: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Return the scales side by side, 0 for blocks of zeros.

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
        """Return fixed-width codes with scales in float32. Projected weights lie on the grid and get the codes they came from."""
        chunk = encode_fixed(rows[0], rows[1], self.form, scales=parameters)
        return self.form.codec, {"block": self.form.block_size or 0, "scales": "fp32"}, [chunk]
