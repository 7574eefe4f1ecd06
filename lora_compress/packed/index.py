"""The index of a packed file: which modules it holds, and which bytes belong to which. docs/format.md defines it."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError
from ..files.dtypes import DTYPE_NAMES, TensorSpec
from ..files.header import parse_json
from ..layouts.plain import KOHYA_KEYS, PlainKeys
from .chunks import Chunk

__all__ = ["ModuleRecord", "PackedIndex", "carried_check", "read_index"]

_LARGEST_INDEX = 1 << 22  # bytes of JSON; a thousand modules take 80,000. Python needs up to 40 bytes of memory for each
_MOST_MODULES = 1 << 16
_LONGEST_NAME = 1000  # characters of a module's name or of a key
_LARGEST_LAYER = 1 << 31  # weights of a layer
_LARGEST_FACTORS = 1 << 28  # weights that the modules of any file may have, and this many more for each byte of payload:
_WEIGHTS_PER_BYTE = 1 << 10  # far above what a useful LoRA has, far below what would exhaust memory
_COLUMNS = {"name": str, "out": int, "in": int, "kernel": list, "rank": int, "codec": str, "parameters": dict, "keys": int}
_CARRIED = "carried"
_CHECK = "crc32"  # the column with the check of each module
_CHUNK_COLUMNS = ("module", "bytes")


@dataclass(frozen=True)
class ModuleRecord:
    """One module's row in the index.

    Args:
        name: of the module, as the plain file has it.
        outputs: rows of dW.
        inputs: channels of the input; dW has inputs * kernel columns.
        kernel: kernel size of a convolution, () for a linear layer.
        rank: number of components that are stored.
        codec: name of the codec that made the payload.
        parameters: of the codec, JSON values.
        kept: which output and input channels are stored, None for all. The others are zero.
        keys: of the module in the plain file that it stands for.
    """

    name: str
    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    rank: int
    codec: str
    parameters: Mapping[str, Any]
    kept: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)
    keys: PlainKeys = KOHYA_KEYS

    @property
    def weights(self) -> int:
        """Number of weights of both factors when they are decoded, zeros of dropped channels among them."""
        return self.rank * (self.outputs + self.inputs * math.prod(self.kernel))

    @property
    def stored(self) -> tuple[int, int]:
        """Numbers of weights of a stored component, (in * kernel, out), without the channels that were dropped."""
        kept_out, kept_in = self.kept
        outputs = self.outputs if kept_out is None else len(kept_out)
        inputs = self.inputs if kept_in is None else len(kept_in)
        return inputs * math.prod(self.kernel), outputs


@dataclass(frozen=True)
class PackedIndex:
    """The modules of a packed file, and the chunks that its payload is made of.

    Args:
        layout: name of the key layout of the plain file that it stands for.
        entries: one record for each module.
        chunks: (module, bytes, crc32) of each chunk, in the order of the payload. The CRC-32 stands beside the first chunk of a
            module that has bytes, and is 0 for the others; see `chunks.are_intact`.
        carried: CRC-32 of the names, types and shapes of the other tensors in the file, see `carried_check`; None where there are
            none, and in files of versions that did not write it.
    """

    layout: str
    entries: tuple[ModuleRecord, ...]
    chunks: tuple[tuple[int, int, int], ...]
    carried: int | None = None

    @classmethod
    def of(
        cls, layout: str, entries: Sequence[ModuleRecord], chunks: Iterable[tuple[int, Chunk]], carried: int | None = None
    ) -> PackedIndex:
        """Make the index of chunks, each given with the number of its module, in the order of the payload."""
        rows: list[tuple[int, int]] = []
        checks: dict[int, int] = {}
        for module, chunk in chunks:
            rows.append((module, chunk.length))
            if chunk.length:
                checks.setdefault(module, chunk.crc32)
        return cls(layout, tuple(entries), tuple(_checked(rows, checks)), carried)

    @property
    def payload(self) -> int:
        """Number of bytes of the payload."""
        return sum(length for _, length, _ in self.chunks)

    @property
    def missing(self) -> int:
        """Number of modules of which nothing is there: those without a chunk, and all of them where no chunk has bytes."""
        return len(self.entries) - len({module for module, _, _ in self.chunks} if self.payload else ())

    def cut(self, size: int) -> tuple[PackedIndex, int]:
        """Return the index of the first `size` bytes of the payload at most, cut between chunks, and how many bytes it covers."""
        end, count = 0, 0
        for _, length, _ in self.chunks:
            if end + length > size:
                break
            end, count = end + length, count + 1
        return replace(self, chunks=self.chunks[:count]), end

    def without_empty(self, but: Collection[str] = ()) -> PackedIndex:
        """Return the index without the modules of which no chunk has bytes, except those named in `but`."""
        filled = {module for module, length, _ in self.chunks if length}
        kept = [i for i, entry in enumerate(self.entries) if i in filled or entry.name in but]
        place = {module: number for number, module in enumerate(kept)}
        chunks = tuple((place[module], length, crc) for module, length, crc in self.chunks if module in place)
        return replace(self, entries=tuple(self.entries[i] for i in kept), chunks=chunks)

    def check_declared(self) -> None:
        """Compare what the modules that have chunks decode to with the bytes of their chunks.

        Raises:
            FormatError: the file promises more weights than its bytes can stand for.
        """
        weights = sum(self.entries[module].weights for module in {module for module, _, _ in self.chunks})
        if weights > _LARGEST_FACTORS + _WEIGHTS_PER_BYTE * self.payload:
            raise FormatError(f"{weights} weights in {self.payload} bytes are too many to be true")

    def encode(self) -> Tensor:
        """Return the index as bytes, uint8 (n,): JSON by columns, compressed with zlib.

        Raises:
            FormatError: more than a reader accepts.
        """
        styles = list(dict.fromkeys(entry.keys for entry in self.entries))
        checks = {module: crc for module, length, crc in reversed(self.chunks) if length}
        columns: dict[str, list[Any]] = {
            "name": [entry.name for entry in self.entries],
            "out": [entry.outputs for entry in self.entries],
            "in": [entry.inputs for entry in self.entries],
            "kernel": [entry.kernel for entry in self.entries],
            "rank": [entry.rank for entry in self.entries],
            "codec": [entry.codec for entry in self.entries],
            "parameters": [entry.parameters for entry in self.entries],
            "keys": [styles.index(entry.keys) for entry in self.entries],
            _CHECK: [checks.get(i, 0) for i in range(len(self.entries))],
        }
        kept = {str(i): _bitmaps(entry) for i, entry in enumerate(self.entries) if entry.kept != (None, None)}
        modules, lengths = ([row[column] for row in self.chunks] for column in (0, 1))
        steps = [module - before for before, module in pairwise([0, *modules])]  # mostly 1, which takes no room
        chunks = dict(zip(_CHUNK_COLUMNS, (steps, lengths), strict=True))
        keys = [[style.down, style.up, style.alpha] for style in styles]
        content: dict[str, Any] = {"layout": self.layout, "keys": keys, "modules": columns, "kept": kept, "chunks": chunks}
        content |= {} if self.carried is None else {_CARRIED: self.carried}
        text = json.dumps(content, separators=(",", ":")).encode()
        if len(text) > _LARGEST_INDEX or len(self.entries) > _MOST_MODULES:
            raise FormatError(f"an index of {len(self.entries)} modules in {len(text)} bytes is more than a packed file can have")
        self.check_declared()
        return torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)


def read_index(data: bytes, where: str) -> PackedIndex:
    """Undo `PackedIndex.encode`. Every number is checked before memory is allocated by it.

    Raises:
        FormatError: the bytes are no index, or one that contradicts itself.
    """
    unpacked = zlib.decompressobj()
    try:
        text = unpacked.decompress(data, _LARGEST_INDEX)
        if unpacked.unconsumed_tail or not unpacked.eof:
            raise ValueError(f"it is cut, or longer than {_LARGEST_INDEX} bytes")
        content = parse_json(text)
        columns = content["modules"]
        styles = [_keys(style) for style in content["keys"]]
        rows = enumerate(_rows(columns, list(_COLUMNS)))
        entries = tuple(_entry(values, content["kept"].get(str(i)), styles) for i, values in rows)
        chunks = tuple(_chunks(content["chunks"], columns[_CHECK], len(entries)))
        if len({entry.name for entry in entries}) != len(entries):
            raise ValueError("a module is named twice")
        keys = [key for entry in entries for key in entry.keys.of_module(entry.name)]
        if len(set(keys)) != len(keys):
            raise ValueError("two modules have the same keys")
        carried = content.get(_CARRIED)
        if carried is not None and not (type(carried) is int and 0 <= carried < 1 << 32):
            raise ValueError("its check of the other tensors is none")
        return PackedIndex(str(content["layout"]), entries, chunks, carried)
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where}: its index cannot be read ({error}): the file is damaged") from None


def carried_check(specs: Mapping[str, TensorSpec]) -> int | None:
    """CRC-32 of what a header says of tensors that a packed file carries, which the checks of its modules do not cover.

    Of the lines `key dtype shape`, sorted, as JSON arrays such as `["te.weight","F16",[2,3]]`; None for no tensors.
    """
    lines = sorted(
        json.dumps([key, DTYPE_NAMES[spec.dtype], list(spec.shape)], separators=(",", ":")) for key, spec in specs.items()
    )
    return zlib.crc32("\n".join(lines).encode()) if lines else None


def _rows(columns: Mapping[str, list[Any]], names: list[str]) -> Iterable[tuple[Any, ...]]:
    lists = [columns[name] for name in names]
    if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        raise ValueError("its columns differ in length")
    if names[0] == "name" and len(lists[0]) > _MOST_MODULES:
        raise ValueError(f"it has {len(lists[0])} modules, allowed: {_MOST_MODULES}")
    return zip(*lists, strict=True)


def _chunks(columns: Mapping[str, list[Any]], checks: list[Any], modules: int) -> Iterable[tuple[int, int, int]]:
    if len(checks) != modules or not all(type(check) is int and 0 <= check < 1 << 32 for check in checks):
        raise ValueError(f"its checks are not those of {modules} modules")
    rows: list[tuple[int, int]] = []
    module = 0
    for step, length in _rows(columns, list(_CHUNK_COLUMNS)):
        if not (type(step) is int and type(length) is int and 0 <= module + step < modules and 0 <= length < 1 << 40):
            raise ValueError(f"chunk {len(rows)} is none, with {length!r} bytes and {step!r} modules after the one before")
        module += step
        rows.append((module, length))
    return _checked(rows, dict(enumerate(checks)))


def _checked(rows: Iterable[tuple[int, int]], checks: Mapping[int, int]) -> Iterable[tuple[int, int, int]]:
    """Yield chunks (module, bytes, crc32) with the check of each module beside its first chunk that has bytes."""
    filled: set[int] = set()
    for module, length in rows:
        yield module, length, checks[module] if length and module not in filled else 0
        if length:
            filled.add(module)


def _keys(style: Any) -> PlainKeys:
    down, up, alpha = style
    given = [down, up] if alpha is None else [down, up, alpha]
    if not all(isinstance(key, str) and len(key) <= _LONGEST_NAME for key in given) or len(set(given)) < len(given):
        raise ValueError("a style of keys is none")
    return PlainKeys(down, up, alpha)


def _entry(values: Sequence[Any], kept: Any, styles: Sequence[PlainKeys]) -> ModuleRecord:
    for value, (column, kind) in zip(values, _COLUMNS.items(), strict=True):
        if type(value) is not kind:
            raise ValueError(f"{column}={value!r} is no {kind.__name__}")
    name, outputs, inputs, kernel, rank, codec, parameters, style = values
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"a name has {len(name)} characters")
    sizes = [outputs, inputs, *kernel]
    if len(kernel) > 3 or not all(type(size) is int and 1 <= size <= _LARGEST_LAYER for size in sizes):
        raise ValueError(f"{name} has the sizes {sizes}")
    channels = [
        None if k is None else _channels(k, count) for k, count in zip(kept or (None, None), (outputs, inputs), strict=True)
    ]
    if not 0 <= style < len(styles):
        raise ValueError(f"{name} has keys number {style}")
    entry = ModuleRecord(name, outputs, inputs, tuple(kernel), rank, codec, parameters, (channels[0], channels[1]), styles[style])
    if math.prod(sizes) > _LARGEST_LAYER or not 1 <= rank <= min(entry.stored):
        raise ValueError(f"{name} has the sizes {sizes} and the rank {rank}")
    return entry


def _bitmaps(entry: ModuleRecord) -> list[str | None]:
    """Return the kept channels as bits in hexadecimal, the first channel in the highest bit of the first byte."""
    return [
        None if kept is None else np.packbits(np.isin(np.arange(count), kept)).tobytes().hex()
        for kept, count in zip(entry.kept, (entry.outputs, entry.inputs), strict=True)
    ]


def _channels(bitmap: Any, count: int) -> tuple[int, ...]:
    """Undo `_bitmaps`. No memory is allocated before the length is known to be right."""
    if not isinstance(bitmap, str) or len(bitmap) != 2 * (-(-count // 8)):
        raise ValueError(f"kept channels are no bitmap of {count}")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(bitmap), np.uint8))
    if bits[count:].any() or not bits.any():
        raise ValueError(f"kept channels are none, or more than {count}")
    return tuple(np.flatnonzero(bits).tolist())
