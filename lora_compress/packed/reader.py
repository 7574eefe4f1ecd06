"""The modules of a packed LoRA, decoded one at a time, wherever its bytes are: in a file or in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import FormatError
from ..update import LowRankUpdate
from .chunks import are_intact
from .index import ModuleRecord, PackedIndex
from .module import decode_module, decoded_rank, stage_count

__all__ = ["PackedModules"]


class _Part(NamedTuple):
    """A chunk of a module: its first byte in the payload, its length, and its check as the index has it."""

    begin: int
    length: int
    check: int


class PackedModules:
    """What the index and the payload of a packed LoRA hold, as far as the payload goes.

    Args:
        index: of the whole LoRA.
        payload: bytes that the payload is announced to have.
        available: bytes of it that are there; fewer where a file was cut.
        read: returns the bytes of the payload from `begin` on, `length` of them.
        where: names the LoRA in messages.

    Attributes:
        index: of what is there.
        available: bytes of the payload that it covers.
        entries: of the modules that can be decoded, by name.
        missing: names of the modules of which nothing is there.

    Raises:
        FormatError: index and payload contradict each other.
    """

    def __init__(self, index: PackedIndex, payload: int, available: int, read: Callable[[int, int], bytes], where: str) -> None:
        if index.payload != payload:
            raise FormatError(f"{where}: its payload has {payload} bytes, the index speaks of {index.payload}: the file is damaged")
        self.index, self.available = index.cut(max(min(payload, available), 0))
        try:
            self.index.check_declared()
        except FormatError as error:
            raise FormatError(f"{where}: {error}: the file is damaged") from None
        self._read, self._where = read, where
        self._parts: dict[str, list[_Part]] = {}
        begin = 0
        for module, length, check in self.index.chunks:
            self._parts.setdefault(index.entries[module].name, []).append(_Part(begin, length, check))
            begin += length
        self.entries: dict[str, ModuleRecord] = {entry.name: entry for entry in index.entries if entry.name in self._parts}
        self.missing = tuple(entry.name for entry in index.entries if entry.name not in self._parts)

    def chunks(self, name: str) -> list[bytes]:
        """Return the stages of a module's payload that are there, compared with their check.

        Raises:
            FormatError: they are damaged.
        """
        parts = self._parts[name]
        found = [self._read(part.begin, part.length) for part in parts]
        whole = all(len(data) == part.length for data, part in zip(found, parts, strict=True))
        if not whole or not are_intact(found, [part.check for part in parts]):
            raise FormatError(f"{self._where}: {name}: its bytes do not match their checksum: the file is damaged")
        return found

    def decode(self, name: str, dtype: torch.dtype = torch.float32) -> LowRankUpdate:
        """Decode a module to factors of `dtype` on the CPU; nothing of it is kept.

        Raises:
            FormatError: it is damaged, or of a codec that this program does not know.
        """
        chunks = self.chunks(name)
        try:
            return decode_module(self.entries[name], chunks, dtype)
        except FormatError as error:
            raise FormatError(f"{self._where}: {name}: {error}") from None

    def decoded_rank(self, name: str) -> int:
        """Return the rank of a module when it is decoded: of a cut file fewer components than the index speaks of."""
        entry = self.entries[name]
        return entry.rank if len(self._parts[name]) == stage_count(entry) else decoded_rank(entry, self.chunks(name))

    def payload_bytes(self, name: str) -> int:
        """Return the bytes of a module's chunks."""
        return sum(part.length for part in self._parts[name])
