"""Key layouts of LoRA files, one module each, and the reader of them all."""

from .kohya import as_kohya, from_kohya
from .source import LoraSource, open_lora, require_readable
from .survey import ModuleShape

__all__ = ["LoraSource", "ModuleShape", "as_kohya", "from_kohya", "open_lora", "require_readable"]
