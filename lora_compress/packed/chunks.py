"""The coded bytes of modules, kept on disk until the file is assembled, so that memory stays bounded."""

from __future__ import annotations

import mmap
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SaveError

__all__ = ["Chunk", "Spool", "are_intact", "payload_tensor"]


class _Source(Protocol):
    def read(self, begin: int, length: int) -> bytes: ...


def are_intact(layers: Sequence[bytes], checks: Sequence[int]) -> bool:
    """Compare the stages of a module with the checks in the index.

    The index has the CRC-32 of the first stage that has bytes; each stage of a progressive payload holds the check of the next.
    """
    filled = ((data, check) for data, check in zip(layers, checks, strict=True) if data)
    data, check = next(filled, (b"", 0))
    return zlib.crc32(data) == check


@dataclass(frozen=True)
class Chunk:
    """A run of bytes of the payload, one stage of one module.

    Args:
        length: number of bytes.
        crc32: their CRC-32.
        source: reads them.
        begin: where they begin in the source.
    """

    length: int
    crc32: int
    source: _Source
    begin: int = 0

    @classmethod
    def of(cls, data: bytes) -> Chunk:
        """Return a chunk of bytes that are in memory."""
        return cls(len(data), zlib.crc32(data), _Bytes(data))

    @classmethod
    def predicted(cls, length: int) -> Chunk:
        """Return a chunk of which the length alone is known; it reads as zeros."""
        return cls(length, zlib.crc32(bytes(length)), _Zeros())

    def __len__(self) -> int:
        return self.length

    def read(self) -> bytes:
        """Return the bytes."""
        return self.source.read(self.begin, self.length)


@dataclass(frozen=True)
class _Bytes:
    data: bytes

    def read(self, begin: int, length: int) -> bytes:
        return self.data


class _Zeros:
    def read(self, begin: int, length: int) -> bytes:
        return bytes(length)


class Spool:
    """A file without a name in `folder`, in which chunks wait. It is gone with the last of them, and whenever the program ends.

    Raises:
        SaveError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._end = folder, 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when nobody needs it any more
            weakref.finalize(self, self._file.close)
        except OSError as error:
            raise self._refused(error) from error

    def keep(self, chunk: Chunk) -> Chunk:
        """Write the bytes of a chunk to the end of the file, and return a chunk that reads them from there."""
        begin, self._end = self._end, self._end + len(chunk)
        try:
            self._file.seek(begin)
            self._file.write(chunk.read())
        except OSError as error:
            raise self._refused(error) from error
        return Chunk(chunk.length, chunk.crc32, self, begin)

    def read(self, begin: int, length: int) -> bytes:
        """Return bytes that were kept."""
        self._file.seek(begin)
        return self._file.read(length)

    def tensor(self) -> Tensor:
        """Return all that was kept as a tensor, uint8 (n,), mapped from the file: writing it elsewhere needs no memory."""
        if not self._end:
            return torch.empty(0, dtype=torch.uint8)
        try:
            self._file.flush()
            return torch.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> SaveError:
        reason = error.strerror or str(error)
        return SaveError(f"{self._folder}: cannot be written ({reason}): free disk space or choose another output folder")


def payload_tensor(chunks: Iterable[Chunk], spool: Spool | None = None) -> Tensor:
    """Return the bytes of chunks one after the other, uint8 (n,).

    Args:
        chunks: in the order of the payload.
        spool: an empty one, from which the result is mapped; None for a tensor in memory.
    """
    if spool is not None:
        for chunk in chunks:
            spool.keep(chunk)
        return spool.tensor()
    data = bytearray().join(chunk.read() for chunk in chunks)
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
