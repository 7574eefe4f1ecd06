"""The packed file: a safetensors file with an index of its modules and the coded bytes of them all (docs/format.md)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError
from ..files.dtypes import TensorSpec
from ..files.header import header_has, read_header, verify_data
from ..files.regular import open_regular, require_regular, same_file
from ..layouts.numbered import numbered_metadata
from ..layouts.peft_config import PeftConfig
from ..layouts.plain import PlainKeys
from ..sources.base import LazyTensors, LoraSource
from ..update import LowRankUpdate, ModuleShape
from .chunks import Chunk
from .index import ModuleRecord, PackedIndex, carried_check, read_index
from .module import stage_place
from .reader import PackedModules

__all__ = ["FORMAT_KEY", "FORMAT_VERSION", "INDEX_KEY", "PAYLOAD_KEY", "PackedFile", "is_packed", "lay_out"]

FORMAT_KEY = "lora_compress_format"
FORMAT_VERSION = "1"
INDEX_KEY = "lora_compress.index"
PAYLOAD_KEY = "lora_compress.payload"


class PackedFile(LoraSource):
    """A packed file as a source of modules. It may have been cut anywhere behind its index.

    What a cut file lacks is left out: a progressive module comes in less detail, another one not at all.

    Args:
        path: of the file.

    Attributes:
        index: of the modules that are there.
        entries: their records by name.
        available: bytes of the payload that are there.
        missing: names of the modules of which nothing is there.

    Raises:
        FormatError: no such file, no packed file, an unknown version, or damage; on opening or when a module is read.
    """

    packed = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open_regular(self.path) as file:
            self._before = os.fstat(file.fileno())
        header = self._header = read_header(self.path)
        self.metadata = header.metadata
        version = self.metadata.get(FORMAT_KEY, FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise FormatError(f"{path}: packed format {version}, this program reads {FORMAT_VERSION}: update LoRA Compress")
        if INDEX_KEY not in header.tensors or PAYLOAD_KEY not in header.tensors:
            raise FormatError(f"{path}: has no {INDEX_KEY}: it is no packed LoRA")
        index = read_index(self._read(INDEX_KEY), str(path))
        specs = {key: tensor.spec(self.path, key) for key, tensor in header.tensors.items()}
        self.carried = {key: spec for key, spec in specs.items() if key not in (INDEX_KEY, PAYLOAD_KEY)}
        if index.carried is not None and index.carried != carried_check(self.carried):
            raise FormatError(
                f"{path}: {len(self.carried)} other tensors ({next(iter(self.carried), 'none')} first), whose names, types or "
                "shapes are not those that the index was written with: the file is damaged, get it again"
            )
        self._verified = False
        if any(key in header.tensors for entry in index.entries for key in entry.keys.of_module(entry.name)):
            raise FormatError(f"{path}: a key of a module is also that of another tensor: the file is damaged")
        _, _, begin, end = header.tensors[PAYLOAD_KEY]

        def read(first: int, length: int) -> bytes:
            return self._bytes(begin + first, length)

        self._modules = PackedModules(index, end - begin, header.available - begin, read, str(path))
        self.index, self.available = self._modules.index, self._modules.available
        self.entries, self.missing = self._modules.entries, self._modules.missing
        self.shapes = {n: ModuleShape(e.outputs, e.inputs, e.kernel, e.rank) for n, e in self.entries.items()}
        self.others = LazyTensors(self.carried, self._carried)
        self.layout, self.notes = self.index.layout, self._cut_notes()
        self.rounds_once = not any("scale" in entry.parameters for entry in self.entries.values())

    @property
    def complete(self) -> bool:
        """Whether the file has all bytes of its payload."""
        payload = self._header.tensors[PAYLOAD_KEY]
        return self.available == payload.end - payload.begin

    def require_whole(self) -> None:
        """Raises: FormatError: the file was cut so early that modules are missing."""
        if self.missing:
            raise FormatError(f"{self.path}: cut short: {len(self.missing)} modules are missing: get it again")

    def _cut_notes(self) -> list[str]:
        """Say that the file was cut, if it was."""
        if self.complete:
            return []
        left = f"; {len(self.missing)} modules are missing" if self.missing else ""
        return [f"the file is cut after {self.available} bytes of its payload: it is read as the smaller LoRA that is there{left}"]

    def _carried(self, key: str) -> Tensor:
        """Read a tensor that is carried through.

        Raises:
            FormatError: the data of the file, if it is whole, do not match the hash in its metadata.
        """
        if self.carried[key].nbytes:
            self._verify()
        return self._tensor(key)

    def _verify(self) -> None:
        """Compare the data of a whole file with the hash in its metadata, once: the index has checks of its modules alone."""
        if self._verified or self._header.promised > self._header.available:
            return
        with open_regular(self.path) as file:
            verify_data(file, self.path, self.metadata.get("sshs_model_hash"))
        self._verified = True

    def factor_bytes(self, name: str) -> int:
        """Return the bytes of a module's chunks."""
        return self._modules.payload_bytes(name)

    def plain_keys(self, name: str) -> PlainKeys:
        """Return the keys of the plain file that the module came from."""
        return self.entries[name].keys

    def plain_metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Return the metadata of a plain file that holds these modules at these ranks."""
        metadata = {key: value for key, value in self.metadata.items() if key != FORMAT_KEY}
        keys = [(self.plain_keys(name), rank) for name, rank in ranks.items()]
        return numbered_metadata(PeftConfig.rewritten(metadata, ranks, self.path), keys)

    def codec(self, name: str) -> str:
        """Return the name of the codec that a module is coded with."""
        return self.entries[name].codec

    def _tensor(self, key: str) -> Tensor:
        spec = self.carried[key]
        data = bytearray(self._read(key))
        return torch.frombuffer(data, dtype=spec.dtype).reshape(spec.shape) if data else torch.empty(spec.shape, dtype=spec.dtype)

    def chunks(self, name: str) -> list[bytes]:
        """Return the stages of a module's payload that are there, compared with their check."""
        return self._modules.chunks(name)

    def payload(self, size: int) -> bytes:
        """Return the first `size` bytes of the payload."""
        return self._read(PAYLOAD_KEY, size)

    def __getitem__(self, name: str) -> LowRankUpdate:
        return self.decode(name, self.dtype)

    def decode(self, name: str, dtype: torch.dtype | None = None) -> LowRankUpdate:
        """Decode a module to factors of `dtype`, float32 by default: each weight is that of `self[name]`, rounded."""
        return self._modules.decode(name, dtype or self.dtype)

    def decoded_rank(self, name: str) -> int:
        """Return the rank of a module when it is decoded: of a cut file fewer components than the index speaks of."""
        return self._modules.decoded_rank(name)

    def _read(self, key: str, size: int | None = None) -> bytes:
        _, _, begin, end = self._header.tensors[key]
        end = end if size is None else begin + size
        if end > self._header.available:
            raise FormatError(f"{self.path}: ends before {key} does: a packed file can be cut, but not that early")
        return self._bytes(begin, end - begin)

    def _bytes(self, begin: int, size: int) -> bytes:
        """Read bytes of the data.

        Raises:
            FormatError: the file is not the one that was opened any more.
        """
        with open_regular(self.path) as file:
            if not same_file(self._before, os.fstat(file.fileno())):
                raise FormatError(f"{self.path}: another program has written to the file since it was opened: open it again")
            file.seek(self._header.begin + begin)
            return file.read(size)


def lay_out(
    layout: str, stored: Iterable[tuple[ModuleRecord, Sequence[Chunk]]], carried: Mapping[str, TensorSpec] | None = None
) -> tuple[PackedIndex, list[Chunk]]:
    """Put the stages of all modules in order, first stages first, so that the beginning of a file is a smaller LoRA.

    Args:
        layout: name of the key layout of the plain file that the packed one stands for.
        stored: each module's record and the stages of its payload.
        carried: the other tensors of the file by key.

    Returns:
        The index, and the chunks in the order of the payload.
    """
    modules = list(stored)
    places = [(stage_place(entry, stage), i, stage) for i, (entry, stages) in enumerate(modules) for stage in range(len(stages))]
    chunks = [(i, modules[i][1][stage]) for _, i, stage in sorted(places)]
    index = PackedIndex.of(layout, [entry for entry, _ in modules], chunks, carried_check(carried or {}))
    return index, [chunk for _, chunk in chunks]


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a packed LoRA, by its header alone; False for anything that is no safetensors file.

    Example:
        >>> is_packed("packed.safetensors"), is_packed("lora.safetensors")
        (True, False)

    Raises:
        FormatError: there is no such file.
    """
    try:
        return header_has(Path(path), INDEX_KEY)
    except FormatError:
        require_regular(path)
        return False
