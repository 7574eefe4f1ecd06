"""What a file is that cannot be opened as weights, told from its first bytes, so that the error names it and the remedy."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from ..errors import FormatError
from .regular import open_regular, size_of

__all__ = ["is_safetensors", "is_torch", "what_is"]

_BEGINNING = 4096  # bytes that are looked at
_AGAIN = "get it again"
_TO_SAFETENSORS = "give the weights as a .safetensors file"

# Signatures at the beginning of a file, what such a file is, and what to do. https://en.wikipedia.org/wiki/List_of_file_signatures
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer that stands for the real file",
        "run `git lfs pull`, or download the file itself",
    ),
    (b"GGUF", "a GGUF file, which is not read here", _TO_SAFETENSORS),
    (b"\x89PNG", "a PNG image", _TO_SAFETENSORS),
    (b"\xff\xd8\xff", "a JPEG image", _TO_SAFETENSORS),
    (b"GIF8", "a GIF image", _TO_SAFETENSORS),
    (b"RIFF", "an image or a video (RIFF)", _TO_SAFETENSORS),
    (b"%PDF", "a PDF document", _TO_SAFETENSORS),
    (b"\x89HDF", "an HDF5 file", _TO_SAFETENSORS),
    (b"\x93NUMPY", "a NumPy array", _TO_SAFETENSORS),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"Rar!", "a RAR archive", "unpack it first"),
)
_MARKUP = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does: the length of its header, then a JSON object."""
    head = _head(path)
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 8 + length <= size_of(path)


def is_torch(path: Path) -> bool:
    """Whether a file is one that torch.save may have written: a zip archive with a data.pkl, or a pickle."""
    head = _head(path)
    if head[:4] == b"PK\x03\x04":
        return _may_hold_pickle(path)
    cut_safetensors = head[4:9] == b"\0\0\0\0{"  # the length of a header of 0x0280 bytes looks like the start of a pickle
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and not cut_safetensors


def what_is(path: Path) -> str:
    """What a file is and what to do about it, such as "it is a GGUF file ...: give ..."; "" where that is not known."""
    head = _head(path)
    if not head:
        return f"it is an empty file: {_AGAIN}"
    for signature, what, remedy in _SIGNATURES:
        if head.startswith(signature):
            return f"it is {what}: {remedy}"
    if head.lstrip().lower().startswith(_MARKUP):
        return "it is a web page, which a site may send instead of a file: download the file again, logged in if it asks for that"
    if is_torch(path):
        return "it is a PyTorch file under another name: rename it to end in .pt"
    if head[:4] == b"PK\x03\x04":
        return "it is a zip archive: unpack it first"
    if not head.strip(b"\0"):
        return f"it holds nothing but zeros, as an interrupted download does: {_AGAIN}"
    return _what_text(head)


def _what_text(head: bytes) -> str:
    text = head.decode("utf-8", errors="ignore")
    if len(text.encode()) < len(head) - 4 or any(ord(letter) < 32 and letter not in "\t\n\r\f" for letter in text):
        return ""
    first = text.strip()[:1]
    if first and first in "{[":
        return f"it is JSON text: {_TO_SAFETENSORS}"
    line = json.dumps(" ".join(text.split())[:40])
    return f"it is a text file that begins {line}: {_TO_SAFETENSORS}"


def _may_hold_pickle(path: Path) -> bool:
    """Whether an archive has what torch.save writes; of a damaged one nobody knows: torch will refuse it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:  # damaged directories raise nearly anything
        return True


def _head(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(min(_BEGINNING, os.fstat(file.fileno()).st_size))
    except (OSError, FormatError):
        return b""
