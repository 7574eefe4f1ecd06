"""Strategy mixed: integers as in strategy dynamic, with bits for each component that a search for a budget chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import FormatError
from .dynamic import INTEGER_GROUP_SIZES
from .fake import FakeQuantizer
from .fixed import MIXED as CODEC_NAME
from .fixed import FixedFormat, decode_fixed, fixed_size
from .fixed_width import DEFAULT_GROUP_SIZE, GAUSSIAN_DISTORTIONS, encode_rows, stored_format
from .plan import ModulePlan
from .strategy import BudgetSearch, CodedRows, Decoder, Options, StoredModule, Strategy

__all__ = ["MIXED_BITS"]

_MOST_BITS = 8


class _MixedDecoder(Decoder):
    """Reads payloads whose parameter `bits` holds runs of components: [[6, 2], [4, 1]] is 6, 6 and 4 bits."""

    def decode(self, module: StoredModule, chunks: Sequence[bytes], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rows, as `Decoder.decode`."""
        form, bits = stored_format(module, chunks), _unroll(module.parameters["bits"], module.rank)
        return decode_fixed(chunks[0], module.rank, module.inputs, module.outputs, form, bits, dtype)


class _Mixed(Strategy):
    name = "mixed"
    search = BudgetSearch.COMPONENT_BITS
    allowed_bits = "an average from 2 to 8, or none with a target"
    needs_bits = False
    group_sizes = INTEGER_GROUP_SIZES
    distortions = GAUSSIAN_DISTORTIONS
    untrainable = "its bits are chosen at saving"
    decoders: Mapping[str, Decoder] = {CODEC_NAME: _MixedDecoder()}

    def allows(self, bits: float) -> bool:
        """Return whether bits are an average of those that components can have."""
        return 2 <= bits <= _MOST_BITS

    def codec_name(self, options: Options) -> str:
        """Return the one codec name of this strategy."""
        return CODEC_NAME

    def encode(self, down: Tensor, up: Tensor, plan: ModulePlan, options: Options, *, predict: bool = False) -> CodedRows:
        """Quantize and pack the rows, as `Strategy.encode`.

        Raises:
            FormatError: the plan has no bits for each component.
        """
        coded = encode_rows(down, up, _form(options), plan.bits)
        coded.parameters["bits"] = _runs(plan.bits or ())
        return coded

    def payload_size(
        self, rank: int, inputs: int, outputs: int, options: Options, bits: Sequence[int] | None = None, scale_bytes: int = 2
    ) -> int:
        """Return the bytes of the payload of a module: exactly with the bits of its components, else by their average."""
        if bits is None:
            return super().payload_size(rank, inputs, outputs, options)
        return fixed_size(rank, inputs, outputs, _form(options), bits)

    def fake_quantizer(self, options: Options) -> FakeQuantizer:
        """Raise an error: there is none, as `untrainable` says."""
        raise NotImplementedError(f"strategy {self.name} cannot quantize while training: {self.untrainable}")


def _form(options: Options) -> FixedFormat:
    return FixedFormat(CODEC_NAME, options.group_size or DEFAULT_GROUP_SIZE)


def _runs(bits: Sequence[int]) -> list[list[int]]:
    """[6, 6, 4] as [[6, 2], [4, 1]]."""
    runs: list[list[int]] = []
    for value in bits:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def _unroll(runs: Sequence[Sequence[int]], rank: int) -> list[int]:
    if any(type(number) is not int or number < 1 for run in runs for number in run) or sum(count for _, count in runs) != rank:
        raise FormatError(f"bits {runs} are not those of {rank} components: the file is damaged")
    return [bits for bits, count in runs for _ in range(count)]


MIXED_BITS = _Mixed()
