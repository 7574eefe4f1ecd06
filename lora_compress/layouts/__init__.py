"""Key layouts of LoRA files, one module each, and the reader of them all."""

from .kohya import FP8, as_kohya, from_kohya, to_kohya
from .source import LoraSource, open_lora
from .survey import ModuleShape

__all__ = ["FP8", "LoraSource", "ModuleShape", "as_kohya", "from_kohya", "open_lora", "to_kohya"]
