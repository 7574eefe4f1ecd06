"""Strategies whose codes all have the same width: the interface of a strategy on `Codec`, which holds the levels of a code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import FormatError
from .codecs import Codec
from .fake import FakeQuantizer, FixedFakeQuantizer
from .fixed import FixedFormat, decode_fixed, encode_fixed, fixed_size
from .plan import ModulePlan
from .strategy import BudgetSearch, CodedRows, Decoder, Options, StoredModule, Strategy, whole_number

__all__ = ["DEFAULT_GROUP_SIZE", "GAUSSIAN_DISTORTIONS", "FixedDecoder", "FixedWidth", "encode_rows", "stored_format"]

DEFAULT_GROUP_SIZE = 64
# Relative squared error of a Gaussian factor by bits, scales for groups of 64 weights: the squares of the errors that
# tests/core/test_quantization.py measures, int2 to int8.
GAUSSIAN_DISTORTIONS: Mapping[int, float] = {2: 0.143, 3: 0.036, 4: 0.009, 5: 0.0024, 6: 0.0006, 8: 0.00004}
_SCALES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_SCALE_DTYPES = {name: dtype for dtype, name in _SCALES.items()}


class FixedDecoder(Decoder):
    """Reads payloads of one fixed-width codec."""

    def decode(self, module: StoredModule, chunks: Sequence[bytes], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rows, as `Decoder.decode`."""
        form = stored_format(module, chunks)
        return decode_fixed(chunks[0], module.rank, module.inputs, module.outputs, form, None, dtype)


class FixedWidth(Strategy):
    """A strategy with a fixed-width codec for each number of bits, and scales for groups of weights.

    Args:
        name: in settings and reports.
        codecs: by the bits that settings give; `Codec.name` is what files call them.
        group_sizes: values that the setting `group_size` may have.
        distortions: relative squared error of a Gaussian factor by bits, for all bits of `codecs`.
        needs_bits: whether `bits` must be given.
        off_at_16: whether `bits=16` is allowed.
        at_other_bits: the strategy for bits that this one does not have.

    Raises:
        ValueError: a codec has other bits than those that it stands for, or no distortion.
    """

    search = BudgetSearch.RANKS

    def __init__(
        self,
        name: str,
        codecs: Mapping[int, Codec],
        group_sizes: tuple[int, ...] = (32, 64, 128, 256),
        distortions: Mapping[int, float] = GAUSSIAN_DISTORTIONS,
        *,
        needs_bits: bool = True,
        off_at_16: bool = False,
        at_other_bits: str | None = None,
    ) -> None:
        if wrong := [bits for bits, codec in codecs.items() if codec.bits != bits or bits not in distortions]:
            raise ValueError(f"strategy {name}: bits {wrong} have a codec of other bits, or no distortion")
        self.name, self.group_sizes, self.distortions = name, group_sizes, distortions
        self.needs_bits, self.off_at_16, self.at_other_bits = needs_bits, off_at_16, at_other_bits
        self.allowed_bits = ", ".join(map(str, sorted(codecs)))
        self._by_bits = dict(codecs)
        self.codecs = tuple(codecs.values())
        self.decoders = {codec.name: FixedDecoder() for codec in self.codecs}

    def allows(self, bits: float) -> bool:
        """Return whether there is a codec of so many bits, or 16 means none."""
        return bits in self._by_bits or (self.off_at_16 and bits == 16)

    def codec_name(self, options: Options) -> str:
        """Return the name of the codec of the settings' bits."""
        return self._by_bits[int(options.bits or 0)].name

    def stored_as(self, options: Options) -> FixedFormat:
        """Return how the rows of a module are stored at these settings."""
        return FixedFormat(self.codec_name(options), options.group_size or DEFAULT_GROUP_SIZE)

    def encode(self, down: Tensor, up: Tensor, plan: ModulePlan, options: Options, *, predict: bool = False) -> CodedRows:
        """Quantize and pack the rows, as `Strategy.encode`."""
        return encode_rows(down, up, self.stored_as(options))

    def payload_size(
        self, rank: int, inputs: int, outputs: int, options: Options, bits: Sequence[int] | None = None, scale_bytes: int = 2
    ) -> int:
        """Return the bytes of the payload of a module, exactly."""
        form = self.stored_as(options)
        if scale_bytes != form.scale_dtype.itemsize:
            form = FixedFormat(form.codec, form.block_size, form.static_scale, torch.float32)
        return fixed_size(rank, inputs, outputs, form, bits)

    def fake_quantizer(self, options: Options) -> FakeQuantizer:
        """Return a quantizer for training whose parameters are the scales, in float32."""
        return FixedFakeQuantizer(self.stored_as(options))


def encode_rows(down: Tensor, up: Tensor, form: FixedFormat, bits: Sequence[int] | None = None) -> CodedRows:
    """Quantize and pack rows down (rank, inputs) and up (rank, outputs), with `bits` per component for `mixed`."""
    chunk = encode_fixed(down, up, form, bits)
    rows = decode_fixed(chunk, len(down), down.shape[1], up.shape[1], form, bits)
    parameters = {"block": form.block_size or 0, "scales": _SCALES[form.scale_dtype]}
    return CodedRows(form.codec, len(down), parameters, [chunk], rows, range(len(down)))


def stored_format(module: StoredModule, chunks: Sequence[bytes]) -> FixedFormat:
    """Return how the rows of a module in a packed file are stored, from the parameters `block` and `scales`.

    Raises:
        FormatError: there is not exactly one stage.
        KeyError, TypeError, ValueError: the parameters are not those of fixed-width codes.
    """
    block = whole_number(module.parameters["block"])
    form = FixedFormat(module.codec, block or None, scale_dtype=_SCALE_DTYPES[module.parameters["scales"]])
    if len(chunks) != 1:
        raise FormatError(f"{len(chunks)} layers, {module.codec} has one: the file is damaged")
    return form
