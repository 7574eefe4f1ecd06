"""The file that is written: its header, its metadata and its size, from the encoded modules and what is carried through."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files.dtypes import TensorSpec
from ..files.metadata import ModuleScale, finish_metadata, true_header
from ..files.writer import safetensors_size
from ..layouts.plain import FP8, PlainKeys
from ..packed.chunks import Chunk, payload_tensor
from ..packed.file import FORMAT_KEY, FORMAT_VERSION, INDEX_KEY, PAYLOAD_KEY, lay_out
from ..packed.index import ModuleRecord, PackedIndex
from ..settings import CompressionSettings
from ..update import LowRankUpdate, relative_error
from .encode import EncodedModule

__all__ = ["OutputFile"]

_ZEROS_RANK = 2  # rank of the zeros that stand for a dropped module: no program misreads the scale of rank 2
_OF_THE_RUN = {"quantization_device": None, "allow_larger": None}  # settings that say nothing about the file


class Described(Protocol):
    """What a file must know of a module, whoever encoded it: its record without a codec, ||dW||_F^2, and alpha in the input."""

    @property
    def shape(self) -> ModuleRecord: ...
    @property
    def norm(self) -> float: ...
    @property
    def alpha(self) -> float: ...


@dataclass(frozen=True)
class OutputFile:
    """A compressed file that is being made.

    Args:
        job: that makes its modules.
        layout: name of the key layout of the plain file.
        metadata: returns the metadata of the input for a file of the given ranks.
        carried: types and shapes of the input's tensors that belong to no module.
        extras: of those that go with a module, by its name.
        more: entries for the metadata, as ss_compress_* keys.
        keeps_all: whether zeros of rank 2 stand for modules that were dropped: PEFT makes a layer for every module that its
            configuration targets, and warns of those that it finds no weights for, or leaves them random.
    """

    settings: CompressionSettings
    modules: Mapping[str, Described]
    dtype: Callable[[], torch.dtype]
    layout: str = "kohya"
    metadata: Callable[[Mapping[str, int]], Mapping[str, str]] = lambda ranks: {}
    carried: Mapping[str, TensorSpec] = field(default_factory=dict)
    extras: Mapping[str, Mapping[str, TensorSpec]] = field(default_factory=dict)
    more: Mapping[str, str] = field(default_factory=dict)
    keeps_all: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether it is a packed file."""
        return self.settings.save_format in ("packed", "both")

    def specs(self, stored: Mapping[str, EncodedModule]) -> dict[str, TensorSpec]:
        """Return type and shape of every tensor of the file."""
        specs = self.passed_on(stored)
        if self.is_packed:
            index, _ = self.packed(stored)
            payload = TensorSpec(torch.uint8, (index.payload,))
            return specs | {INDEX_KEY: TensorSpec.of(index.encode()), PAYLOAD_KEY: payload}
        for name, module in stored.items():
            shape, rank = self.modules[name].shape, module.padded
            ones = (1,) * len(shape.kernel)
            down, up = (rank, shape.inputs, *shape.kernel), (shape.outputs, rank, *ones)
            specs |= shape.keys.specs(name, down, up, self.dtype())
        return specs | {key: TensorSpec.of(zeros) for key, zeros in self.placeholders(stored).items()}

    def passed_on(self, stored: Mapping[str, EncodedModule]) -> dict[str, TensorSpec]:
        """Return the tensors of the input that the file gets unchanged. What belongs to a dropped module goes with it."""
        return dict(self.carried) | {key: spec for name in self.kept(stored) for key, spec in self.extras.get(name, {}).items()}

    def kept(self, stored: Mapping[str, EncodedModule]) -> list[str]:
        """Return the modules that the file has, those of zeros among them."""
        return [*self.modules] if self.keeps_all else [*stored]

    def ranks(self, stored: Mapping[str, EncodedModule]) -> dict[str, int]:
        """Return the ranks that the modules have in the file."""
        own = {name: module.rank if self.is_packed else module.padded for name, module in stored.items()}
        return {name: own.get(name, _ZEROS_RANK) for name in self.kept(stored)}

    def placeholders(self, stored: Mapping[str, EncodedModule]) -> dict[str, Tensor]:
        """Return the zeros that stand for dropped modules; they take no memory."""
        zeros: dict[str, Tensor] = {}
        for name in self.kept(stored):
            if name not in stored:
                shape = self.modules[name].shape
                down = torch.zeros((), dtype=self.dtype()).expand(_ZEROS_RANK, shape.inputs, *shape.kernel)
                up = torch.zeros((), dtype=self.dtype()).expand(shape.outputs, _ZEROS_RANK, *(1,) * len(shape.kernel))
                zeros |= shape.keys.factors(name, LowRankUpdate(down, up, float(_ZEROS_RANK)))
        return zeros

    def packed(self, stored: Mapping[str, EncodedModule]) -> tuple[PackedIndex, list[Chunk]]:
        """Return index and chunks of a packed file."""
        return lay_out(self.layout, [(m.entry, m.chunks) for m in stored.values() if m.entry is not None], self.passed_on(stored))

    def finished_metadata(self, stored: Mapping[str, EncodedModule]) -> dict[str, str]:
        """Return the metadata of the file."""
        packed = self.is_packed
        ranks = self.ranks(stored)
        alphas = [module.alpha for module in stored.values()]
        details = {**self.settings.as_dict(), **self.details(stored), **_OF_THE_RUN, **self.more}
        scales = {name: ModuleScale(ranks[name], self._gain(name, alpha)) for name, alpha in zip(stored, alphas, strict=True)}
        finished = finish_metadata(true_header(self.metadata(ranks), scales), ranks.values(), alphas, details)
        return finished | ({FORMAT_KEY: FORMAT_VERSION} if packed else {})

    def _gain(self, name: str, alpha: float) -> float | None:
        """Return alpha in the file / alpha in the input; None for fp8, whose alpha is known only at the end."""
        before = self.modules[name].alpha
        return None if (self.dtype() == FP8 and not self.is_packed) or not before else alpha / before

    def details(self, stored: Mapping[str, EncodedModule]) -> dict[str, Any]:
        """Return what was done, for the metadata."""
        before = sum(analysis.shape.rank for analysis in self.modules.values())
        return {
            "modules": f"{len(stored)}/{len(self.modules)}",
            "components": f"{sum(module.rank for module in stored.values())}/{before}",
            "relative_error": f"{self.error(stored):.6e}",
        }

    def error(self, stored: Mapping[str, EncodedModule]) -> float:
        """Return ||dW - dW'||_F / ||dW||_F over the file."""
        lost = sum(stored[name].squared_error if name in stored else analysis.norm for name, analysis in self.modules.items())
        return relative_error(lost, sum(analysis.norm for analysis in self.modules.values()))

    def tensors(self, stored: Mapping[str, EncodedModule]) -> dict[str, Tensor]:
        """Return the tensors of the file that belong to its modules, in memory.

        Args:
            stored: the modules, those of a plain file with their factors.
        """
        if self.is_packed:
            index, chunks = self.packed(stored)
            return {INDEX_KEY: index.encode(), PAYLOAD_KEY: payload_tensor(chunks)}
        plain = {name: module.plain for name, module in stored.items() if module.plain is not None}
        return {key: tensor for name, update in plain.items() for key, tensor in self._keys(name).tensors(name, update).items()}

    def _keys(self, name: str) -> PlainKeys:
        return self.modules[name].shape.keys

    def size(self, stored: Mapping[str, EncodedModule]) -> int:
        """Return the bytes of the file."""
        return safetensors_size(self.specs(stored), self.finished_metadata(stored))

    def module_bytes(self, name: str, stored: EncodedModule) -> int:
        """Return the bytes of a module's factors and alpha, or of its chunks."""
        if self.is_packed:
            return sum(map(len, stored.chunks))
        shape = self.modules[name].shape
        weights = stored.padded * (shape.outputs + shape.inputs * math.prod(shape.kernel))
        return weights * self.dtype().itemsize + (4 if shape.keys.alpha is not None else 0)
