"""The header of a safetensors file, kept within bounds before it is parsed."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import FormatError
from .offsets import StoredTensor, stored_tensors
from .recognition import what_is
from .regular import open_regular

__all__ = ["Header", "header_has", "header_of", "metadata_of", "parse_json", "read_header", "verify_data"]

# A LoRA of SDXL has 1,014 modules: its header takes 0.4 MB and 45,000 values. The tags of a whole data set (ss_tag_frequency) can
# take many MB more, as one text, and safetensors itself reads headers of up to 100 MB. Python needs up to 80 bytes for a value, 4
# for a byte of ASCII and 8 where a character beyond the basic plane is among them: 0.4 GB for 100 MB of tags, 0.8 GB at most.
_LARGEST_HEADER = 100_000_000  # bytes
_MOST_VALUES = 1 << 20  # numbers, texts, lists and objects; 70,000 tensors
_HASHED_AT_A_TIME = 1 << 20
_PIECE = 1 << 18  # bytes that are counted at a time


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says.

    Args:
        metadata: texts by key.
        tensors: by key, in the order of the header.
        begin: the first byte of the data in the file.
        available: bytes of data that the file has, fewer than the header promises if the file was cut.
    """

    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]
    begin: int
    available: int

    @property
    def promised(self) -> int:
        """Bytes of data that the tensors take."""
        return max((tensor.end for tensor in self.tensors.values()), default=0)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a safetensors file.

    Raises:
        FormatError: no such file, no header of a safetensors file, one far larger than that of any LoRA, or tensors that overlap,
            leave holes or do not have the bytes that they should; see `stored_tensors`. A file that ends early is not refused.
    """
    path = _nameable(path)
    try:
        with open_regular(path) as file:
            return header_of(file, path)
    except OSError as error:
        raise FormatError(f"{path}: no safetensors file, or cut short ({error})") from None


def header_of(file: IO[bytes], path: Path) -> Header:
    """Read the header of a safetensors file that is open, and leave it where its data begin.

    Args:
        file: open for reading; it must be able to seek.
        path: names the file in messages.

    Raises:
        FormatError: as `read_header`.
    """
    entries, metadata, begin, size = _parsed(file, path)
    return Header(metadata, stored_tensors(path, entries, size - begin), begin, size - begin)


def metadata_of(file: IO[bytes], path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file that is open, whatever is wrong with its tensors; see `header_of`."""
    return _parsed(file, path)[1]


def _parsed(file: IO[bytes], path: Path) -> tuple[dict[str, Any], dict[str, str], int, int]:
    """Return the entries of the tensors, the metadata, where the data begin and how large the file is."""
    text, size = _text_of(file, path)
    if (values := _count_values(text)) > _MOST_VALUES:
        raise _too_large(path, f"more than {values - 1} values", _MOST_VALUES)
    begin, escaped = 8 + len(text), b"\\u" in text
    try:
        decoded = text.decode()
        del text  # of what may be 100 MB no more copies are kept than are needed
        entries = json.loads(decoded)
        del decoded
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: no safetensors file, {_why_not(path)} ({error})") from None
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: no safetensors file, {_why_not(path)}")
    metadata = entries.pop("__metadata__", None) or {}
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not texts or (escaped and not all(map(_is_text, (*entries, *metadata, *metadata.values())))):
        raise FormatError(f"{path}: its metadata are no texts: the file is damaged")
    return entries, metadata, begin, size


def verify_data(file: IO[bytes], path: Path, expected: str | None) -> None:
    """Compare the data of a safetensors file with what its header says of them.

    Args:
        file: open for reading; its position is moved.
        path: names the file in messages.
        expected: SHA-256 of all bytes behind the header (`sshs_model_hash` of the metadata) in hexadecimal; None leaves it out.

    Raises:
        FormatError: the file is shorter or longer than its header says, or the data have another hash.
    """
    header = header_of(file, path)
    if header.promised != header.available:
        found, right = (header.begin + size for size in (header.available, header.promised))
        raise FormatError(f"{path}: has {found} bytes, its header speaks of {right}: the file is damaged, get it again")
    if expected is None:
        return
    digest = hashlib.sha256()
    while block := file.read(_HASHED_AT_A_TIME):
        digest.update(block)
    if digest.hexdigest() != expected:
        raise FormatError(f"{path}: its data do not match the hash in its metadata: the file is damaged, get it again")


def _is_text(text: str) -> bool:
    """Whether a text is one, without half of a surrogate pair, which could not be written again."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def header_has(path: str | os.PathLike[str], key: str) -> bool:
    """Whether the header of a safetensors file has a key of ASCII characters, mostly without parsing the header.

    Raises:
        FormatError: as `read_header`.
    """
    path = _nameable(path)
    with open_regular(path) as file:
        text, _ = _text_of(file, path)
        in_text = json.dumps(key).encode() in text or b"\\u00" in text  # ASCII may be escaped
        return in_text and key in header_of(file, path).tensors


def _nameable(path: str | os.PathLike[str]) -> Path:
    """Raises: FormatError: the name is not valid UTF-8."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise FormatError(f"{path}: the name is not valid UTF-8, with which safetensors opens no file: rename it") from None
    return Path(path)


def _text_of(file: IO[bytes], path: Path) -> tuple[bytes, int]:
    """Return the header as it stands in the file, and the size of the file, which is left where the data begin."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if 8 + length > size:
        raise FormatError(f"{path}: no safetensors file, {_why_not(path)}")
    if length > _LARGEST_HEADER:
        raise _too_large(path, f"{length} bytes", _LARGEST_HEADER)
    return file.read(length), size


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
