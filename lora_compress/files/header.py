"""The header of a safetensors file, kept within bounds before it is parsed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

from ..errors import FormatError
from .offsets import check_offsets
from .recognition import what_is
from .regular import open_regular

__all__ = ["header_has", "parse_json", "read_header", "verify_data"]

# A LoRA of SDXL has 1,014 modules: its header takes 0.4 MB and 45,000 values. The tags of a whole data set (ss_tag_frequency) can
# take many MB more, as one text, and safetensors itself reads headers of up to 100 MB. Python needs up to 80 bytes for a value, 4
# for a byte of ASCII and 8 where a character beyond the basic plane is among them: 0.4 GB for 100 MB of tags, 0.8 GB at most.
_LARGEST_HEADER = 100_000_000  # bytes
_MOST_VALUES = 1 << 20  # numbers, texts, lists and objects; 70,000 tensors
_HASHED_AT_A_TIME = 1 << 20
_PIECE = 1 << 18  # bytes that are counted at a time


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where its data begin, and how many bytes of data are there.

    Raises:
        FormatError: no such file, no header of a safetensors file, one far larger than that of any LoRA, or tensors that overlap,
            leave holes or do not have the bytes that they should; see `check_offsets`. A file that ends early is not refused.
    """
    text, size = _read_text(path)
    if (values := _count_values(text)) > _MOST_VALUES:
        raise _too_large(path, f"more than {values - 1} values", _MOST_VALUES)
    begin, escaped = 8 + len(text), b"\\u" in text
    try:
        decoded = text.decode()
        del text  # of what may be 100 MB no more copies are kept than are needed
        header = json.loads(decoded)
        del decoded
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: no safetensors file, {_why_not(path)} ({error})") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: no safetensors file, {_why_not(path)}")
    metadata = header.get("__metadata__") or {}
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not texts or (escaped and not all(map(_is_text, (*header, *metadata, *metadata.values())))):
        raise FormatError(f"{path}: its metadata are no texts: the file is damaged")
    check_offsets(path, {key: entry for key, entry in header.items() if key != "__metadata__"}, size - begin)
    return header, begin, size - begin


def verify_data(file: IO[bytes], name: str | os.PathLike[str], expected: str | None) -> None:
    """Compare the data of a safetensors file with what its header says of them.

    Args:
        file: open for reading; its position is moved.
        name: of the file, for messages.
        expected: SHA-256 of all bytes behind the header (`sshs_model_hash` of the metadata) in hexadecimal; None leaves it out.

    Raises:
        FormatError: the file is shorter or longer than its header says, or the data have another hash.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    begin = 8 + int.from_bytes(file.read(8), "little")
    if begin > min(size, 8 + _LARGEST_HEADER):
        raise FormatError(f"{name}: no safetensors file, or cut short")
    header = json.loads(file.read(begin - 8))
    header.pop("__metadata__", None)
    end = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise FormatError(f"{name}: has {size} bytes, its header speaks of {end}: the file is damaged, get it again")
    if expected is None:
        return
    digest = hashlib.sha256()
    while block := file.read(_HASHED_AT_A_TIME):
        digest.update(block)
    if digest.hexdigest() != expected:
        raise FormatError(f"{name}: its data do not match the hash in its metadata: the file is damaged, get it again")


def _is_text(text: str) -> bool:
    """Whether a text is one, without half of a surrogate pair, which could not be written again."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def header_has(path: Path, key: str) -> bool:
    """Whether the header of a safetensors file has a key of ASCII characters, mostly told without parsing it.

    Raises: as `read_header`.
    """
    text, _ = _read_text(path)
    return (json.dumps(key).encode() in text or b"\\u00" in text) and key in read_header(path)[0]  # ASCII may be escaped


def _read_text(path: Path) -> tuple[bytes, int]:
    """The header as it stands in the file, and the size of the file."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise FormatError(f"{path}: the name is not valid UTF-8, with which safetensors opens no file: rename it") from None
    try:
        with open_regular(path) as file:
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
    """Texts, and commas and opening brackets outside of them, up to one more than are allowed.

    Each value and key of JSON is one of these or follows one. The text is looked at in pieces, for which it is never copied whole.
    """
    count, quotes, inside, rest = 0, 0, False, b""
    for begin in range(0, len(text), _PIECE):
        piece = rest + text[begin : begin + _PIECE]
        whole = len(piece) - (len(piece) - len(piece.rstrip(b"\\"))) % 2  # a backslash belongs to what follows it
        piece, rest = piece[:whole], piece[whole:]
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[inside::2])
        quotes += len(parts) - 1
        inside ^= len(parts) % 2 == 0
        count += sum(map(outside.count, (b",", b"[", b"{")))
        if count + quotes // 2 > _MOST_VALUES:
            return _MOST_VALUES + 1
    return count + quotes // 2


def _too_large(path: Path, found: str, allowed: int) -> FormatError:
    return FormatError(
        f"{path}: a header of {found}, allowed: {allowed}: it is no LoRA and no model, or was made to exhaust memory"
    )
