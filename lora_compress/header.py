"""The header of a safetensors file, kept within bounds before it is parsed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import FormatError
from .recognition import what_is

__all__ = ["header_has", "parse_json", "read_header"]

# A LoRA of SDXL has 1,014 modules: its header takes 0.4 MB and 45,000 values. Captions of a whole data set in the metadata can
# take some MB more, as one text. Python needs up to 9 bytes for a byte of text and 80 for a value: 190 MB with both at their most.
_LARGEST_HEADER = 1 << 24  # bytes
_MOST_VALUES = 1 << 19  # numbers, texts, lists and objects; 35,000 tensors


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where its data begin, and how many bytes of data are there.

    Raises:
        FormatError: no such file, no header of a safetensors file, or one far larger than that of any LoRA.
    """
    text, size = _read_text(path)
    try:
        if (values := _count_values(text)) > _MOST_VALUES:
            raise _too_large(path, f"{values} values", _MOST_VALUES)
        header = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: no safetensors file, {_why_not(path)} ({error})") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: no safetensors file, {_why_not(path)}")
    metadata = header.get("__metadata__") or {}
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise FormatError(f"{path}: its metadata are no texts: the file is damaged")
    return header, 8 + len(text), size - 8 - len(text)


def header_has(path: Path, key: str) -> bool:
    """Whether the header of a safetensors file has a key; of most files without it, told without parsing the header.

    Raises: as `read_header`.
    """
    text, _ = _read_text(path)
    return (json.dumps(key).encode() in text or b"\\u" in text) and key in read_header(path)[0]


def _read_text(path: Path) -> tuple[bytes, int]:
    """The header as it stands in the file, and the size of the file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size:
                raise FormatError(f"{path}: no safetensors file, {_why_not(path)}")
            if length > _LARGEST_HEADER:
                raise _too_large(path, f"{length} bytes", _LARGEST_HEADER)
            return file.read(length), size
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: no safetensors file, or cut short ({error})") from None


def _why_not(path: Path) -> str:
    """What a file is that has no sound header, where its first bytes tell it."""
    return what_is(path) or "or cut short"


def parse_json(text: bytes) -> Any:
    """A tree of JSON.

    Raises:
        ValueError: it is none, or holds half of a surrogate pair, which is no text and could not be written again.
    """
    tree = json.loads(text)
    if b"\\u" in text:
        json.dumps(tree, ensure_ascii=False).encode()
    return tree


def _count_values(text: bytes) -> int:
    """Texts, and commas and opening brackets outside of them: each value and key of JSON is one of these or follows one."""
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    texts = bare.count(b'"') // 2
    if texts > _MOST_VALUES:
        return texts
    outside = b"".join(bare.split(b'"')[::2])
    return texts + sum(map(outside.count, (b",", b"[", b"{")))


def _too_large(path: Path, found: str, allowed: int) -> FormatError:
    return FormatError(
        f"{path}: a header of {found}, allowed: {allowed}: it is no LoRA and no model, or was made to exhaust memory"
    )
