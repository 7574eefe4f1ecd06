"""How updates are keyed in plain files: one module for each key layout, and the registry of them all."""

from .kohya import as_kohya, from_kohya

__all__ = ["as_kohya", "from_kohya"]
