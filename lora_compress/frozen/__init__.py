"""Frozen layers whose weights stay packed in 8 or 4 bits and are decoded only while they are used."""

from .layers import FrozenBytes, dequantized_weight, is_frozen, quantize_frozen, weight_bytes
from .weights import WEIGHT_FORMATS, require_bitsandbytes

__all__ = [
    "WEIGHT_FORMATS",
    "FrozenBytes",
    "dequantized_weight",
    "is_frozen",
    "quantize_frozen",
    "require_bitsandbytes",
    "weight_bytes",
]
