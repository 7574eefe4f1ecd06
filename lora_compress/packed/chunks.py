"""What coding made of modules waits on disk, not in memory, until the file can be put together."""

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
    """Compare layers of a module with what the index says of them: the CRC-32 of the first that has bytes; it vouches for more."""
    filled = ((data, check) for data, check in zip(layers, checks, strict=True) if data)
    data, check = next(filled, (b"", 0))
    return zlib.crc32(data) == check


@dataclass(frozen=True)
class Chunk:
    """A run of bytes of a payload, a layer of one module: their number and CRC-32, and where they are."""

    length: int
    crc32: int
    source: _Source
    begin: int = 0

    @classmethod
    def of(cls, data: bytes) -> Chunk:
        """Bytes in memory."""
        return cls(len(data), zlib.crc32(data), _Bytes(data))

    @classmethod
    def predicted(cls, length: int) -> Chunk:
        """Bytes of which the number alone is known: zeros."""
        return cls(length, zlib.crc32(bytes(length)), _Zeros())

    def __len__(self) -> int:
        return self.length

    def read(self) -> bytes:
        """The bytes."""
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
    """A nameless file in `folder`, which is gone with the last chunk that waits in it, and whenever the program ends.

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
        """The same chunk, its bytes at the end of the file."""
        begin, self._end = self._end, self._end + len(chunk)
        try:
            self._file.seek(begin)
            self._file.write(chunk.read())
        except OSError as error:
            raise self._refused(error) from error
        return Chunk(chunk.length, chunk.crc32, self, begin)

    def read(self, begin: int, length: int) -> bytes:
        """Bytes that were kept."""
        self._file.seek(begin)
        return self._file.read(length)

    def tensor(self) -> Tensor:
        """All that was kept, uint8 (n,), mapped: no memory is needed to write it elsewhere."""
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
    """The bytes of chunks one after the other, uint8 (n,): in memory, or mapped from a spool that has been empty until now."""
    if spool is not None:
        for chunk in chunks:
            spool.keep(chunk)
        return spool.tensor()
    data = bytearray().join(chunk.read() for chunk in chunks)
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
