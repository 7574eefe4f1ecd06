"""Sources: where the modules of a LoRA come from. `sources.open` opens files, `base` is the protocol of all of them."""

from .base import LoraSource

__all__ = ["LoraSource"]
