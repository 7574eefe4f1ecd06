"""Quantizers: pure grids, packing of codes, the codecs by name, and payloads of fixed-width codes."""

from .codecs import CODECS, Codec, codec_by_id
from .fixed import MIXED, FixedFormat, component_size, decode_fixed, encode_fixed, fixed_size
from .packing import WIDTHS, pack_bits, packed_width, unpack_bits
from .support import QuantizationSupport, check_quantization_support

__all__ = [
    "CODECS",
    "MIXED",
    "WIDTHS",
    "Codec",
    "FixedFormat",
    "QuantizationSupport",
    "check_quantization_support",
    "codec_by_id",
    "component_size",
    "decode_fixed",
    "encode_fixed",
    "fixed_size",
    "pack_bits",
    "packed_width",
    "unpack_bits",
]
