"""What a file is put together from: its metadata, the modules as they were stored, the tensors that are carried through."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..files.dtypes import TensorSpec
from ..files.metadata import ModuleScale, finish_metadata, true_header
from ..files.writer import safetensors_size
from ..layouts.plain import FP8
from ..packed.chunks import Chunk
from ..packed.file import FORMAT_KEY, FORMAT_VERSION, INDEX_KEY, PAYLOAD_KEY, lay_out
from ..packed.index import PackedIndex
from ..update import LowRankUpdate, relative_error
from .encode import EncodedModule, Encoder

__all__ = ["OutputFile"]

_ZEROS_RANK = 2  # of a module that was dropped, where it must be there: no program misreads the scale of rank 2
_OF_THE_RUN = {"quantization_device": None, "allow_larger": None}  # say nothing of the file


@dataclass(frozen=True)
class OutputFile:
    """A compressed file in the making.

    Args:
        job: that makes its modules.
        layout: key layout of the plain file.
        metadata: of the input, made true for the ranks that the file holds.
        carried: tensors of the input that belong to no module.
        extras: and those that go with a module, by its name.
        more: to tell in the metadata, as ss_compress_* keys.
        keeps_all: whether zeros of rank 2 stand for modules that were dropped: PEFT makes a layer for every module that its
            configuration targets, and warns of those that it finds no weights for, or leaves them random.
    """

    encoder: Encoder
    layout: str = "kohya"
    metadata: Callable[[Mapping[str, int]], Mapping[str, str]] = lambda ranks: {}
    carried: Mapping[str, TensorSpec] = field(default_factory=dict)
    extras: Mapping[str, Mapping[str, TensorSpec]] = field(default_factory=dict)
    more: Mapping[str, str] = field(default_factory=dict)
    keeps_all: bool = False

    def specs(self, stored: Mapping[str, EncodedModule]) -> dict[str, TensorSpec]:
        """What the header of the file says."""
        specs = self.passed_on(stored)
        if self.encoder.packed:
            index, _ = self.packed(stored)
            payload = TensorSpec(torch.uint8, (index.payload,))
            return specs | {INDEX_KEY: TensorSpec.of(index.encode()), PAYLOAD_KEY: payload}
        for name, module in stored.items():
            shape, rank = self.encoder.components[name].shape, module.padded
            ones = (1,) * len(shape.kernel)
            down, up = (rank, shape.inputs, *shape.kernel), (shape.outputs, rank, *ones)
            specs |= shape.keys.specs(name, down, up, self.encoder.dtype)
        return specs | {key: TensorSpec.of(zeros) for key, zeros in self.placeholders(stored).items()}

    def passed_on(self, stored: Mapping[str, EncodedModule]) -> dict[str, TensorSpec]:
        """Tensors of the input that the file gets: what went with a module goes where the module goes."""
        return dict(self.carried) | {key: spec for name in self.kept(stored) for key, spec in self.extras.get(name, {}).items()}

    def kept(self, stored: Mapping[str, EncodedModule]) -> list[str]:
        """The modules that the file has, zeros among them."""
        return [*self.encoder.components] if self.keeps_all else [*stored]

    def ranks(self, stored: Mapping[str, EncodedModule]) -> dict[str, int]:
        """The ranks that the modules have in the file."""
        own = {name: module.rank if self.encoder.packed else module.padded for name, module in stored.items()}
        return {name: own.get(name, _ZEROS_RANK) for name in self.kept(stored)}

    def placeholders(self, stored: Mapping[str, EncodedModule]) -> dict[str, Tensor]:
        """Zeros for the modules that were dropped, without memory for them."""
        zeros: dict[str, Tensor] = {}
        for name in self.kept(stored):
            if name not in stored:
                shape = self.encoder.components[name].shape
                down = torch.zeros((), dtype=self.encoder.dtype).expand(_ZEROS_RANK, shape.inputs, *shape.kernel)
                up = torch.zeros((), dtype=self.encoder.dtype).expand(shape.outputs, _ZEROS_RANK, *(1,) * len(shape.kernel))
                zeros |= shape.keys.factors(name, LowRankUpdate(down, up, float(_ZEROS_RANK)))
        return zeros

    def packed(self, stored: Mapping[str, EncodedModule]) -> tuple[PackedIndex, list[Chunk]]:
        """Index and chunks of a packed file."""
        return lay_out(self.layout, [(m.entry, m.chunks) for m in stored.values() if m.entry is not None], self.passed_on(stored))

    def finished_metadata(self, stored: Mapping[str, EncodedModule]) -> dict[str, str]:
        """The metadata of the file."""
        packed = self.encoder.packed
        ranks = self.ranks(stored)
        alphas = [float(module.rank) if packed else module.alpha for module in stored.values()]
        details = {**self.encoder.settings.as_dict(), **self.details(stored), **_OF_THE_RUN, **self.more}
        scales = {name: ModuleScale(ranks[name], self._gain(name, alpha)) for name, alpha in zip(stored, alphas, strict=True)}
        finished = finish_metadata(true_header(self.metadata(ranks), scales), ranks.values(), alphas, details)
        return finished | ({FORMAT_KEY: FORMAT_VERSION} if packed else {})

    def _gain(self, name: str, alpha: float) -> float | None:
        """alpha of a module in the file / its alpha in the input; None of fp8, whose alpha is known only at the end."""
        before = self.encoder.components[name].alpha
        return None if (self.encoder.dtype == FP8 and not self.encoder.packed) or not before else alpha / before

    def details(self, stored: Mapping[str, EncodedModule]) -> dict[str, Any]:
        """What was done, for the metadata."""
        components = self.encoder.components
        before = sum(analysis.shape.rank for analysis in components.values())
        return {
            "modules": f"{len(stored)}/{len(components)}",
            "components": f"{sum(module.rank for module in stored.values())}/{before}",
            "relative_error": f"{self.error(stored):.6e}",
        }

    def error(self, stored: Mapping[str, EncodedModule]) -> float:
        """||dW - dW'|| / ||dW|| over the file."""
        components = self.encoder.components
        lost = sum(stored[name].squared_error if name in stored else analysis.norm for name, analysis in components.items())
        return relative_error(lost, sum(analysis.norm for analysis in components.values()))

    def size(self, stored: Mapping[str, EncodedModule]) -> int:
        """Bytes of the file."""
        return safetensors_size(self.specs(stored), self.finished_metadata(stored))

    def module_bytes(self, name: str, stored: EncodedModule) -> int:
        """Bytes of a module's factors and alpha, or of its chunks."""
        if self.encoder.packed:
            return sum(map(len, stored.chunks))
        shape = self.encoder.components[name].shape
        weights = stored.padded * (shape.outputs + shape.inputs * math.prod(shape.kernel))
        return weights * self.encoder.dtype.itemsize + (4 if shape.keys.alpha is not None else 0)
