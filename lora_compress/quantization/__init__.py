"""Quantizers: pure grids, packing of codes, and the codecs by name."""

from .codecs import CODECS, Codec, codec_by_id
from .packing import pack_bits, packed_width, unpack_bits

__all__ = ["CODECS", "Codec", "codec_by_id", "pack_bits", "packed_width", "unpack_bits"]
