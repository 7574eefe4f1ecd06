"""The interface of a strategy: everything that the project asks about one way of storing weights.

A strategy is what the setting `strategy` names. Each is one object in a file of its own, and `registry.register` makes it known to
the settings, the budget searches, the engine, training and the readers of packed files. `FixedWidth` implements the interface for
codes of a fixed width, so that a new set of levels takes a few lines; docs/architecture.md has an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from .codecs import Codec
from .fake import FakeQuantizer
from .plan import ModulePlan

__all__ = ["BudgetSearch", "CodedRows", "Decoder", "Options", "StoredModule", "Strategy", "whole_number"]

_MOST_BITS = 8.0  # per weight, of averages
_LARGEST = 1 << 31  # of a whole number among the parameters of a codec


class BudgetSearch(Enum):
    """What a search for a size or an error varies beside the ranks, and so how a strategy is searched."""

    RANKS = "the ranks alone: every component has the bits of the settings"
    COMPONENT_BITS = "the bits of each component"
    STEP_SIZE = "one quantizer step size for the whole file"


class Options(Protocol):
    """The settings that a strategy reads: `settings.QuantizationSettings`, which documents them."""

    @property
    def bits(self) -> float | None: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def progressive(self) -> bool: ...
    @property
    def refine(self) -> bool: ...


@dataclass(frozen=True)
class CodedRows:
    """The rows of one module after encoding.

    Args:
        codec: name that the file's index gives the payload; a `Decoder` is registered under it.
        rank: components in the payload.
        parameters: what the decoder needs beside the payload, as JSON values of the index.
        chunks: stages of the payload, one for most codecs.
        rows: what the payload decodes to: down (rank, inputs) and up (rank, outputs), float32.
        places: (rank,), positions of these components among those that were given to the encoder.
    """

    codec: str
    rank: int
    parameters: dict[str, Any]
    chunks: list[bytes]
    rows: tuple[Tensor, Tensor]
    places: Sequence[int]


@dataclass(frozen=True)
class StoredModule:
    """What the index of a packed file says of the payload of one module.

    Args:
        codec: its name.
        rank: components in the whole payload.
        inputs: weights of a row of down.
        outputs: weights of a row of up.
        parameters: of the codec, JSON values that nobody has checked.
    """

    codec: str
    rank: int
    inputs: int
    outputs: int
    parameters: Mapping[str, Any]


class Decoder(ABC):
    """Reads the payloads that a packed file marks with one codec name.

    Where parameters and payload do not fit each other, a method raises FormatError, KeyError, TypeError, ValueError or
    OverflowError; `packed.module` turns all of them into a FormatError that names the parameters.
    """

    @abstractmethod
    def decode(self, module: StoredModule, chunks: Sequence[bytes], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rows of down (p, inputs) and up (p, outputs), `dtype`, of the p components in the stages that are given."""

    def decoded_rank(self, module: StoredModule, chunks: Sequence[bytes]) -> int:
        """Return the p of `decode`."""
        return module.rank

    def stage_slope(self, module: StoredModule, stage: int) -> float:
        """Return log2 of the least fall of squared error per bit in a stage: stages of all modules are written steepest first."""
        return 0.0


class Strategy(ABC):
    """A way of storing the weights of a file.

    Attributes:
        name: in settings and reports.
        search: what a search for a size or an error varies.
        allowed_bits: the values of the setting `bits`, in words.
        needs_bits: whether `bits` must be given even where nothing is to be quantized.
        off_at_16: whether `bits=16` is allowed, which switches quantization off.
        group_sizes: the values that the setting `group_size` may have; empty if the strategy does not read it.
        ungrouped: what there is instead of groups, in words, where `group_sizes` is empty.
        defaults: by name those of the settings scale, progressive and refine that the strategy reads, and their defaults.
        distortions: relative squared error of a Gaussian factor by whole bits; empty for a search by STEP_SIZE, which measures.
        untrainable: why no training can quantize with it, in words; empty if it has a fake quantizer.
        at_other_bits: name of the strategy that the training controller changes to at bits that this one does not have.
        package: name of the package without which it cannot encode or decode.
        codecs: fixed-width codecs that it brings along.
        decoders: readers of its payloads by the codec names that its `encode` returns.
    """

    name: str
    search: BudgetSearch
    allowed_bits: str
    needs_bits: bool = True
    off_at_16: bool = False
    group_sizes: tuple[int, ...] = ()
    ungrouped: str = ""
    defaults: Mapping[str, Any] = {}
    distortions: Mapping[int, float] = {}
    untrainable: str = ""
    at_other_bits: str | None = None
    package: str | None = None
    codecs: Sequence[Codec] = ()
    decoders: Mapping[str, Decoder] = {}

    @property
    def averages(self) -> bool:
        """Whether `bits` is an average over the file, which a size or an error may take the place of."""
        return self.search is not BudgetSearch.RANKS

    @abstractmethod
    def allows(self, bits: float) -> bool:
        """Return whether the setting `bits` may have this value."""

    @abstractmethod
    def codec_name(self, options: Options) -> str:
        """Return the codec name that the file's index gets at these settings."""

    @abstractmethod
    def encode(self, down: Tensor, up: Tensor, plan: ModulePlan, options: Options, *, predict: bool = False) -> CodedRows:
        """Quantize and code the components of one module.

        Args:
            down: (rank, inputs), rows of the balanced basis, strongest first.
            up: (rank, outputs).
            plan: what was decided for the module.
            options: the settings.
            predict: whether chunks may hold zeros, as many as there would be bytes, to save time while a budget is searched.
        """

    def payload_size(
        self, rank: int, inputs: int, outputs: int, options: Options, bits: Sequence[int] | None = None, scale_bytes: int = 2
    ) -> int:
        """Return the bytes of the payload of a module before it is encoded.

        It is exact for codes of fixed width; otherwise it is what the average `bits` of the settings amount to, 8 without them.

        Args:
            rank: components.
            inputs: weights of a row of down.
            outputs: weights of a row of up.
            options: the settings.
            bits: per component, where a search by COMPONENT_BITS has chosen them.
            scale_bytes: of a stored scale: 2, or 4 after a training with quantized weights.
        """
        return int(rank * (inputs + outputs) * float(options.bits or _MOST_BITS) / 8)

    def component_size(self, inputs: int, outputs: int, options: Options, bits: int | None = None) -> int:
        """Return the bytes of one component, at `bits` in a search by COMPONENT_BITS."""
        return self.payload_size(1, inputs, outputs, options, None if bits is None else (bits,))

    @abstractmethod
    def fake_quantizer(self, options: Options) -> FakeQuantizer:
        """Return a new quantizer for the forward passes of a training; not called if `untrainable` says why there is none."""

    def problems(self, options: Options) -> list[str]:
        """Return what is wrong with the values of the settings in `defaults`, a sentence each."""
        return []


def whole_number(value: Any) -> int:
    """Return a parameter of an index as the whole number that it must be.

    Raises:
        ValueError: it is something else, even if it could be converted, such as text.
    """
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"{value!r} is no int")
    return value
