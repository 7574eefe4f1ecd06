"""The one folder in which results are kept that take long to compute: features of data sets, norms of base models."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return LORA_COMPRESS_CACHE if it is set, else `lora-compress` in the user's cache folder.

    That is LOCALAPPDATA on Windows, XDG_CACHE_HOME elsewhere, and ~/.cache where these are not set. The folder need not exist.
    """
    if own := os.environ.get("LORA_COMPRESS_CACHE"):
        return Path(own)
    root = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lora-compress"
