"""The registry of strategies: one line for each, and `register` for those from outside of the package."""

from __future__ import annotations

from ..errors import FormatError
from .codecs import CODECS, Codec
from .dynamic import DYNAMIC
from .entropy.strategy import ENTROPY
from .fixed_width import FixedDecoder
from .fp8 import FP8_CODEC
from .mixed import MIXED_BITS
from .nf4 import NF4
from .static import STATIC
from .strategy import Decoder, Strategy

__all__ = ["DECODERS", "STRATEGIES", "decoder_named", "register"]

STRATEGIES: dict[str, Strategy] = {}  # by the setting `strategy`
DECODERS: dict[str, Decoder] = {}  # by the codec name in the index of a packed file


def register(strategy: Strategy) -> None:
    """Make a strategy known to settings, engine, training and readers.

    Raises:
        ValueError: its name is taken, or files already name another codec as it does.
    """
    if strategy.name in STRATEGIES:
        raise ValueError(f"strategy {strategy.name}: the name is taken")
    for codec in strategy.codecs:
        _add_codec(codec)
    for name, decoder in strategy.decoders.items():
        if type(DECODERS.setdefault(name, decoder)) is not type(decoder):
            raise ValueError(f"strategy {strategy.name}: the codec name {name} is taken")
    STRATEGIES[strategy.name] = strategy


def decoder_named(name: str) -> Decoder:
    """Return the decoder of payloads that a file's index marks with this codec name.

    Raises:
        FormatError: this program does not know the codec.
    """
    if name not in DECODERS:
        raise FormatError(f"codec {name}: known are {', '.join(DECODERS)}: update LoRA Compress")
    return DECODERS[name]


def _add_codec(codec: Codec) -> None:
    if CODECS.setdefault(codec.name, codec) is not codec:
        raise ValueError(f"codec {codec.name}: the name is taken")


_BUILT_IN: tuple[Strategy, ...] = (DYNAMIC, STATIC, NF4, MIXED_BITS, ENTROPY)
for built_in in _BUILT_IN:
    register(built_in)
_add_codec(FP8_CODEC)
DECODERS[FP8_CODEC.name] = FixedDecoder()
