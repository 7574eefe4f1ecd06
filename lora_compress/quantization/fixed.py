"""The payload of one module in fixed-width codes: a row of bytes per component, so that a prefix is the smaller LoRA.

Row i holds component i in four parts with nothing between them, numbers little-endian:

    scales of down row i | scales of up row i | codes of down row i | codes of up row i

A row of n weights has ceil(n / block_size) scales, one where there is no block size, and ceil(n * bits / 8) bytes of codes,
packed as `packing` says. Weight j is level[code j] * scale[j // block_size] in float32; the levels are those of CODECS.
In the format `mixed` every component has bits of its own: its codec is int2, int3, int4, int5, int6 or int8.
Shapes, rank, format and bits are not in the payload: whoever stores it stores them beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import FormatError
from .codecs import CODECS, Codec
from .packing import WIDTHS, pack_bits, packed_width

__all__ = ["MIXED", "FixedFormat", "component_size", "decode_fixed", "encode_fixed", "fixed_size"]

MIXED = "mixed"
_SCALE_DTYPES = {torch.bfloat16: "<u2", torch.float32: "<f4"}


@dataclass(frozen=True)
class FixedFormat:
    """How the rows of a module are stored.

    Args:
        codec: a name of CODECS, or `mixed` for an integer codec per component.
        block_size: weights that share a scale; None: a whole row.
        static_scale: for the encoder alone: the scale of strategy static, where block_size is None.
        scale_dtype: of the stored scales: torch.bfloat16 or torch.float32.

    Raises:
        FormatError: no such codec, block size or dtype.
    """

    codec: str
    block_size: int | None = 64
    static_scale: float | None = None
    scale_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.codec not in (*CODECS, MIXED):
            raise FormatError(f"codec {self.codec}: known are {', '.join((*CODECS, MIXED))}: update LoRA Compress")
        if self.block_size is not None and self.block_size < 1:
            raise FormatError(f"block size {self.block_size}: must be 1 or more, or none for one scale per row")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise FormatError(f"scales of {self.scale_dtype}: must be torch.bfloat16 or torch.float32")

    def codecs(self, rank: int, bits: Sequence[int] | None) -> list[Codec]:
        """The codec of each component.

        Raises:
            FormatError: `bits` are missing for mixed or given for another codec, not one per component, or not of WIDTHS.
        """
        if self.codec != MIXED:
            if bits is not None:
                raise FormatError(f"codec {self.codec} has the same bits in every component: bits per component belong to mixed")
            return [CODECS[self.codec]] * rank
        if bits is None or len(bits) != rank:
            raise FormatError(f"codec mixed with bits for {0 if bits is None else len(bits)} components: {rank} are needed")
        if strange := set(bits) - set(WIDTHS):
            raise FormatError(f"codec mixed with components of {min(strange)} bits: allowed are {', '.join(map(str, WIDTHS))}")
        return [CODECS[f"int{width}"] for width in bits]


@dataclass(frozen=True)
class _Widths:
    """Bytes of the four parts of a row."""

    scales: tuple[int, int]
    codes: tuple[int, int]

    @classmethod
    def of(cls, inputs: int, outputs: int, codec: Codec, form: FixedFormat) -> _Widths:
        counts = (inputs, outputs)
        blocks = [-(-n // form.block_size) if form.block_size else 1 for n in counts]
        size = form.scale_dtype.itemsize
        return cls((blocks[0] * size, blocks[1] * size), (packed_width(inputs, codec.bits), packed_width(outputs, codec.bits)))

    @property
    def row(self) -> int:
        return sum(self.scales) + sum(self.codes)


def component_size(inputs: int, outputs: int, form: FixedFormat, bits: int | None = None) -> int:
    """Bytes of one component of an (outputs, inputs) layer; `bits` are those of a component of `mixed`."""
    (codec,) = form.codecs(1, None if bits is None else [bits])
    return _Widths.of(inputs, outputs, codec, form).row


def fixed_size(rank: int, inputs: int, outputs: int, form: FixedFormat, bits: Sequence[int] | None = None) -> int:
    """Bytes of the payload of an (outputs, inputs) layer at `rank`; `bits` per component for `mixed`.

    Raises:
        FormatError: `bits` do not fit the format and rank.
    """
    if form.codec != MIXED:
        form.codecs(0, bits)
        return rank * _Widths.of(inputs, outputs, CODECS[form.codec], form).row
    return sum(count * _Widths.of(inputs, outputs, codec, form).row for codec, count in _runs(form.codecs(rank, bits)))


def encode_fixed(
    down: Tensor,
    up: Tensor,
    form: FixedFormat,
    bits: Sequence[int] | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> bytes:
    """Quantize the rows of one module and pack them.

    Args:
        down: (rank, inputs), inputs = in * kernel; as `Spectrum.balanced` gives it.
        up: (rank, outputs).
        form: codec, block size, scales.
        bits: per component, for `mixed` alone.
        scales: of down (rank, blocks) and of up, where they are not to be chosen here: those that a training ended with.

    Raises:
        FormatError: the shapes do not fit each other, a weight is not finite, or `bits` do not fit the format.
    """
    if down.ndim != 2 or up.ndim != 2 or len(down) != len(up):
        raise FormatError(f"down {tuple(down.shape)} and up {tuple(up.shape)}: (rank, inputs) and (rank, outputs) are needed")
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise FormatError("a factor holds NaN or infinity: it cannot be quantized")
    payload, start = [], 0
    for codec, count in _runs(form.codecs(len(down), bits)):
        rows = slice(start, start + count)
        coded = [
            codec.encode(
                factor[rows],
                form.block_size,
                form.static_scale,
                form.scale_dtype,
                None if scales is None else scales[side][rows],
            )
            for side, factor in enumerate((down, up))
        ]
        parts = [_scale_bytes(stored) for _, stored in coded] + [pack_bits(codes, codec.bits).numpy() for codes, _ in coded]
        payload.append(np.concatenate(parts, axis=1).tobytes())
        start += count
    return b"".join(payload)


def decode_fixed(
    payload: bytes | bytearray | memoryview,
    rank: int,
    inputs: int,
    outputs: int,
    form: FixedFormat,
    bits: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "payload",
) -> tuple[Tensor, Tensor]:
    """The factors that a payload stands for: down (rank, inputs) and up (rank, outputs), `dtype`, on the CPU.

    Each weight is the float32 product of its level and its scale, rounded to `dtype`.

    Args:
        payload: exactly `fixed_size` bytes.
        rank: components of the payload; with the first `rank` rows of a longer payload, those of the smaller LoRA.
        name: what error messages call the payload.

    Raises:
        FormatError: a size is not positive, the length does not fit, a scale or a code is not a finite number, or a weight lies
            beyond the range of `dtype`. Nothing is allocated before the length was checked.
    """
    if min(rank, inputs, outputs) < 1:
        raise FormatError(f"{name}: rank {rank} of a ({outputs}, {inputs}) layer: all must be 1 or more")
    expected = fixed_size(rank, inputs, outputs, form, bits)
    if len(payload) != expected:
        raise FormatError(f"{name}: {len(payload)} bytes, its shape asks for {expected}: the file is cut or damaged")
    raw = np.frombuffer(payload, np.uint8)
    factors = torch.empty(rank, inputs, dtype=dtype), torch.empty(rank, outputs, dtype=dtype)
    row, offset = 0, 0
    for codec, count in _runs(form.codecs(rank, bits)):
        widths = _Widths.of(inputs, outputs, codec, form)
        rows = raw[offset : offset + count * widths.row].reshape(count, widths.row)
        _decode_rows(rows, widths, codec, form, [out[row : row + count] for out in factors], name)
        row, offset = row + count, offset + count * widths.row
    return factors


def _decode_rows(
    rows: npt.NDArray[np.uint8], widths: _Widths, codec: Codec, form: FixedFormat, outs: Sequence[Tensor], name: str
) -> None:
    """Fill `outs`, rows of down and of up, with what rows of one codec stand for."""
    start = sum(widths.scales)
    values = _scale_values(rows[:, :start], form.scale_dtype)
    largest = float(values.abs().amax())
    if not math.isfinite(largest):
        raise FormatError(f"{name}: holds a scale that is not finite: the file is damaged")
    scales = values.split([width // form.scale_dtype.itemsize for width in widths.scales], dim=1)
    for out, scale, width in zip(outs, scales, widths.codes, strict=True):
        codec.decode_packed(rows[:, start : start + width], scale, form.block_size, out)
        start += width
        if codec.has_unused_codes and torch.isnan(out).any():
            raise FormatError(f"{name}: holds a code that stands for no number: the file is damaged")
        limit = torch.finfo(out.dtype).max
        if largest * codec.reach > limit and not torch.isfinite(out).all():
            raise FormatError(f"{name}: holds weights above {limit:g}, where {out.dtype} ends: decode to bfloat16 or float32")


def _scale_bytes(scales: Tensor) -> npt.NDArray[np.uint8]:
    """Scales (r, b) as little-endian bytes (r, b * size)."""
    scales = scales.cpu().contiguous()
    bits = scales.view(torch.int16) if scales.dtype == torch.bfloat16 else scales
    stored = bits.numpy().astype("<i2" if scales.dtype == torch.bfloat16 else "<f4")
    return np.frombuffer(stored.tobytes(), np.uint8).reshape(len(scales), -1)


def _scale_values(raw: npt.NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    """Scales (r, b), float32, of little-endian bytes (r, b * size); bfloat16 is the upper half of a float32."""
    stored = np.ascontiguousarray(raw).view(_SCALE_DTYPES[dtype])
    wide = stored.astype(np.uint32) << 16 if dtype == torch.bfloat16 else stored.astype(np.float32)
    return torch.from_numpy(wide.view(np.float32))


def _runs(codecs: Sequence[Codec]) -> Iterator[tuple[Codec, int]]:
    """Neighbouring components of the same codec: the codec and how many."""
    for _, run in itertools.groupby(codecs, key=lambda codec: codec.name):
        members = list(run)
        yield members[0], len(members)
