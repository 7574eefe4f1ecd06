"""One compressed module as one run of bytes, a record: header, then a row per component. docs/format.md fixes it.

A record needs no metadata beside it, and cutting rows off its end leaves the best smaller update.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FormatError
from .quantization import CODECS, Codec, codec_by_id, pack_bits, packed_width, unpack_bits
from .settings import QuantizationSettings
from .spectrum import Spectrum
from .update import LowRankUpdate

__all__ = ["RECORD_VERSION", "decode_record", "encode_record", "record_size"]

RECORD_VERSION = 1
_MAGIC = b"LC"
_HEADER = struct.Struct("<2sBBBBHIII3H6x")  # magic, version, codec, scale dtype, kernel dims, block, rank, out, in, kernel
_SCALE_DTYPES = {0: torch.bfloat16, 1: torch.float32}


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a component's row lie: scales of down, scales of up, codes of down, codes of up."""

    codec: Codec
    scale_dtype: torch.dtype
    block_size: int | None
    inputs: int  # in * kernel
    outputs: int

    def _blocks(self, count: int) -> int:
        return 1 if self.block_size is None else -(-count // self.block_size)

    @property
    def widths(self) -> list[int]:
        """Bytes of the four parts."""
        bits, item = self.codec.bits, self.scale_dtype.itemsize
        counts = (self.inputs, self.outputs)
        return [self._blocks(n) * item for n in counts] + [packed_width(n, bits) for n in counts]


def encode_record(spectrum: Spectrum, rank: int, settings: QuantizationSettings) -> Tensor:
    """Quantize the `rank` strongest components in the balanced basis and pack them: uint8, (record_size,).

    Args:
        spectrum: the update; alpha / r is part of its sigma, so a record has no alpha.
        rank: components to keep, at least 1.
        settings: bits under 16.
    """
    codec = CODECS[settings.codec_name]
    kernel = spectrum.kernel
    down, up = spectrum.balanced(rank)  # (rank, in * kernel), (rank, out)
    inputs, outputs = down.shape[1], up.shape[1]
    layout = _Layout(codec, torch.bfloat16, settings.block_size, inputs, outputs)
    channels = inputs // torch.Size(kernel).numel()
    header = _HEADER.pack(
        _MAGIC,
        RECORD_VERSION,
        codec.id,
        0,
        len(kernel),
        settings.block_size or 0,
        rank,
        outputs,
        channels,
        *(kernel + (0, 0, 0))[:3],
    )
    codes, scales = zip(*(codec.encode(rows, settings.block_size, settings.static_scale) for rows in (down, up)), strict=True)
    parts = [*(scale.contiguous().view(torch.uint8) for scale in scales), *(pack_bits(code, codec.bits) for code in codes)]
    rows = torch.cat([part.cpu() for part in parts], dim=1)
    assert rows.shape == (rank, sum(layout.widths))
    return torch.cat([torch.frombuffer(bytearray(header), dtype=torch.uint8), rows.flatten()])


def decode_record(record: Tensor, name: str = "record") -> LowRankUpdate:
    """The update that a record stands for: float32 factors on the record's device, alpha = rank.

    Raises:
        FormatError: the bytes are no record, or one of a version or codec this program does not know.
    """
    layout, rank, kernel = _read_header(record, name)
    rows = record[_HEADER.size :].reshape(rank, sum(layout.widths))
    scale_down, scale_up, codes_down, codes_up = rows.split(layout.widths, dim=1)
    factors = [
        layout.codec.decode(
            unpack_bits(codes, layout.codec.bits, count),
            scales.clone(memory_format=torch.contiguous_format).view(layout.scale_dtype),  # .contiguous() keeps a lone row's stride
            layout.block_size,
        )
        for codes, scales, count in ((codes_down, scale_down, layout.inputs), (codes_up, scale_up, layout.outputs))
    ]
    return LowRankUpdate.from_matrices(factors[0], factors[1].T.contiguous(), float(rank), kernel)


def record_size(inputs: int, outputs: int, rank: int, settings: QuantizationSettings) -> int:
    """Bytes of the record of a (outputs, inputs) layer at `rank`."""
    layout = _Layout(CODECS[settings.codec_name], torch.bfloat16, settings.block_size, inputs, outputs)
    return _HEADER.size + rank * sum(layout.widths)


def _read_header(record: Tensor, name: str) -> tuple[_Layout, int, tuple[int, ...]]:
    if record.dtype != torch.uint8 or record.ndim != 1 or len(record) < _HEADER.size:
        raise FormatError(f"{name}: found {record.dtype} {tuple(record.shape)}, a record is a run of at least {_HEADER.size} bytes")
    fields = _HEADER.unpack(bytes(record[: _HEADER.size].cpu().tolist()))
    magic, version, codec_id, scale_id, dims, block, rank, outputs, channels, *kernel_fields = fields
    if magic != _MAGIC:
        raise FormatError(f"{name}: begins with {magic!r}, a record begins with {_MAGIC!r}")
    if version != RECORD_VERSION:
        raise FormatError(f"{name}: record version {version}, this program reads {RECORD_VERSION}: update LoRA Compress")
    codec, scale_dtype = codec_by_id(codec_id), _SCALE_DTYPES.get(scale_id)
    if codec is None or scale_dtype is None:
        raise FormatError(f"{name}: codec {codec_id} with scale type {scale_id} is not known here: update LoRA Compress")
    if dims > 3:
        raise FormatError(f"{name}: a kernel of {dims} dimensions, at most 3 are possible")
    kernel = tuple(kernel_fields[:dims])
    layout = _Layout(codec, scale_dtype, block or None, channels * torch.Size(kernel).numel(), outputs)
    expected = _HEADER.size + rank * sum(layout.widths)
    if 0 in (rank, outputs, channels, *kernel) or len(record) != expected:
        raise FormatError(f"{name}: {len(record)} bytes, its header asks for {expected}: the file is cut or damaged")
    return layout, rank, kernel
