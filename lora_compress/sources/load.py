"""Reading a LoRA file, packed or in any key layout, as a whole."""

from __future__ import annotations

import os
import threading
from contextlib import closing, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError
from ..files.regular import open_regular
from ..parallel import each_batch
from ..update import LowRankUpdate
from .base import LoraSource
from .open import open_lora

__all__ = ["LoraFile", "load_lora", "read_lora"]

_BLOCK = 1 << 20


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Args:
        updates: by module name, such as lora_unet_mid_block_attentions_0_proj_in.
        others: tensors that are not part of an update, under their own keys; dora_scale and its like among them.
        metadata: the file's metadata.
        packed: whether it is a packed file.
    """

    updates: dict[str, LowRankUpdate]
    others: dict[str, Tensor]
    metadata: dict[str, str]
    packed: bool


def load_lora(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    alpha: float | None = None,
    peft_config: str | os.PathLike[str] | None = None,
) -> LoraFile:
    """Read a LoRA file of any layout as a whole.

    Example:
        >>> lora = load_lora("lora.safetensors")
        >>> len(lora.updates), lora.packed
        (4, False)

    Args:
        path: of the file.
        dtype: of the factors; None for that of the file, float32 of a packed one.
        alpha, peft_config: as `open_lora` takes them.

    Raises:
        FormatError: as `open_lora`; a module does not decode; a packed file was cut so early that modules are missing.
    """
    with closing(open_lora(path, alpha=alpha, peft_config=peft_config)) as source:
        return read_lora(source, source.path, dtype)


def read_lora(source: LoraSource, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> LoraFile:
    """Read a LoRA as a whole whose file, at `path`, is open already as `source`."""
    _read_ahead(path)  # not before it is known to be a LoRA
    source.require_whole()
    others = dict(source.others)
    for name in source:
        others |= source.extras(name)
    updates = each_batch(lambda names: {name: source.decode(name, dtype) for name in names}, source)  # decoded on all cores
    return LoraFile(updates, others, dict(source.metadata), source.packed)


def _read_ahead(path: str | os.PathLike[str]) -> None:
    """Read the whole file in a thread of its own, into the system's cache: the storage goes on while modules are decoded.

    posix_fadvise would do if it did not wait for a slow disk before it returns.
    """

    def read() -> None:
        block = bytearray(_BLOCK)
        with suppress(OSError, FormatError), open_regular(path) as file:  # whoever needs the bytes finds out
            while file.readinto(block):
                pass

    threading.Thread(target=read, daemon=True).start()
