"""Key layouts of LoRA files, one module each."""

from .kohya import FP8, as_kohya, from_kohya, to_kohya

__all__ = ["FP8", "as_kohya", "from_kohya", "to_kohya"]
