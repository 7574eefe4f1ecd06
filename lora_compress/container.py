"""The packed file: one safetensors with a record per module. docs/format.md is its specification."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import FormatError
from .layouts import from_kohya
from .records import decode_record
from .update import LowRankUpdate

__all__ = ["FORMAT_KEY", "FORMAT_VERSION", "RECORD_SUFFIX", "LoraFile", "is_packed", "load_lora", "to_packed"]

FORMAT_KEY = "lora_compress_format"
FORMAT_VERSION = "1"
RECORD_SUFFIX = ".lora_compress"


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Args:
        updates: by module name, such as lora_unet_mid_block_attentions_0_proj_in.
        others: tensors that belong to no low-rank update, under their own keys.
        metadata: the file's metadata.
        packed: whether the updates were stored as records.
    """

    updates: dict[str, LowRankUpdate]
    others: dict[str, Tensor]
    metadata: dict[str, str]
    packed: bool


def to_packed(records: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Records by module name as the tensors of a packed file."""
    return {name + RECORD_SUFFIX: record for name, record in records.items()}


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a packed LoRA, told from its header alone; False for anything that is no safetensors file.

    Raises:
        FormatError: there is no such file.
    """
    if Path(path).suffix != ".safetensors":
        return False
    with _open(path) as file:
        keys = list(file.keys())
        return FORMAT_KEY in (file.metadata() or {}) or any(key.endswith(RECORD_SUFFIX) for key in keys)


def load_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read a packed file, or a kohya file (.safetensors, .pt, .ckpt).

    Raises:
        FormatError: no such file, no safetensors file, an unknown version, or a module that does not decode.
    """
    tensors, metadata = _read(path)
    version = metadata.get(FORMAT_KEY)
    if version not in (None, FORMAT_VERSION):
        raise FormatError(f"{path}: packed format {version}, this program reads {FORMAT_VERSION}: update LoRA Compress")
    records = {key: tensors.pop(key) for key in list(tensors) if key.endswith(RECORD_SUFFIX)}
    try:
        updates, others = from_kohya(tensors)
        for key, record in records.items():
            updates[key[: -len(RECORD_SUFFIX)]] = decode_record(record, key)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    return LoraFile(updates, others, metadata, bool(records) or version is not None)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    if Path(path).suffix == ".safetensors":
        with _open(path) as file:
            keys = list(file.keys())
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except Exception as error:
        raise FormatError(f"{path}: cannot be read as weights alone ({error}): convert it to .safetensors") from error
    if not isinstance(loaded, Mapping):
        raise FormatError(f"{path}: holds a {type(loaded).__name__}, not weights by key: it is no LoRA")
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}, {}


def _open(path: str | os.PathLike[str]) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: no safetensors file, or cut short ({error})") from error
