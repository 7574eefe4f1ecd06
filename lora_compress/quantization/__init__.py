"""Strategies of quantization and their registry; grids, packing of codes, and payloads of fixed-width codes below them."""

from .codecs import CODECS, Codec, codec_of_levels
from .fake import FakeQuantizer
from .fixed import MIXED, FixedFormat, component_size, decode_fixed, encode_fixed, fixed_size
from .fixed_width import FixedWidth
from .packing import WIDTHS, pack_bits, packed_width, unpack_bits
from .plan import ModulePlan
from .registry import DECODERS, STRATEGIES, decoder_named, register
from .strategy import BudgetSearch, CodedRows, Decoder, Options, StoredModule, Strategy
from .support import QuantizationSupport, check_quantization_support

__all__ = [
    "CODECS",
    "DECODERS",
    "MIXED",
    "STRATEGIES",
    "WIDTHS",
    "BudgetSearch",
    "Codec",
    "CodedRows",
    "Decoder",
    "FakeQuantizer",
    "FixedFormat",
    "FixedWidth",
    "ModulePlan",
    "Options",
    "QuantizationSupport",
    "StoredModule",
    "Strategy",
    "check_quantization_support",
    "codec_of_levels",
    "component_size",
    "decode_fixed",
    "decoder_named",
    "encode_fixed",
    "fixed_size",
    "pack_bits",
    "packed_width",
    "register",
    "unpack_bits",
]
