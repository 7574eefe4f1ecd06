"""Writing safetensors files tensor by tensor. Their size is known before, and the hashes by which A1111 knows a LoRA are added."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .atomic import atomic_path
from .dtypes import DTYPE_NAMES, TensorSpec

__all__ = ["TensorWriter", "atomic_path", "safetensors_size", "write_safetensors"]

_ORDER = {dtype: -position for position, dtype in enumerate(DTYPE_NAMES)}
_NO_HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
_SETTLED_AT_A_TIME = 1 << 24  # bytes that are written before they are hashed and brought to the disk in the background
_HASHED_AT_A_TIME = 1 << 20
_LEGACY_HASHED = range(0x100000, 0x110000)  # bytes of the file, as A1111's first extension took them


class TensorWriter:
    """A safetensors file of known shapes, written tensor by tensor in any order and by any thread, as safetensors would write it.

    On leaving the `with` block it takes the two hashes by which A1111 knows a LoRA, sha256 over the data with the ss_* keys
    of the metadata, and puts them into the header. Metadata is sorted, so that the same content gives the same bytes.

    Args:
        path: to write; goes together with `atomic_path`.
        specs: of all tensors by key.
        metadata: texts by key.

    Attributes:
        metadata: may be replaced before the end by texts that take no more room.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.metadata = dict(metadata)
        self._specs = _in_file_order(specs)
        self._waiting = set(specs)
        self._entries = _entries(self._specs)
        header = _header(self._entries, self.metadata | _NO_HASHES)
        self._data = len(header)  # where it begins
        self._offsets: dict[str, int] = {}
        offset = self._data
        for key, spec in self._specs.items():
            self._offsets[key] = offset
            offset += spec.nbytes
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115 - closed in __exit__
        self._file.write(header)
        self._file.truncate(offset)
        self._position = self._data
        self._lock = threading.Lock()
        self._unsettled = 0
        self._unhashed = deque(self._specs)
        self._digest = hashlib.sha256()
        self._disk = ThreadPoolExecutor(1)
        self._settling: Future[None] = self._disk.submit(lambda: None)

    def write(self, key: str, tensor: Tensor) -> None:
        """Write one tensor, of the dtype and shape that were announced."""
        if TensorSpec.of(tensor) != self._specs[key]:
            raise ValueError(f"{key}: announced as {self._specs[key]}, given as {TensorSpec.of(tensor)}")
        tensor = tensor.detach().cpu() if tensor.requires_grad or tensor.device.type != "cpu" else tensor
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        with self._lock:
            self._waiting.discard(key)
            if self._position != self._offsets[key]:  # a seek empties the buffer: small neighbours wait in it together
                self._file.seek(self._offsets[key])
            self._file.write(data)
            self._position = self._offsets[key] + len(data)
            self._unsettled += len(data)
            if self._unsettled > _SETTLED_AT_A_TIME and self._settling.done():
                self._unsettled = 0
                self._settling.result()  # a system tells an error of the disk once: it must not get lost
                self._settling = self._disk.submit(self._settle)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._waiting:
                    raise ValueError(f"never written: {', '.join(sorted(self._waiting)[:3])}")
                self._settling.result()
                self._file.flush()
                self._settling = self._disk.submit(os.fsync, self._file.fileno())
                self._finish()
                self._settling.result()
        finally:
            self._disk.shutdown()
            self._file.close()

    def _settle(self) -> None:
        """Hash what is written and bring it to the disk, in the background, so that little of that is left for the end."""
        self._hash()
        os.fsync(self._file.fileno())

    def _hash(self) -> None:
        """Go on hashing, up to the first tensor that is not written yet."""
        with self._lock:
            ready = list(takewhile(lambda key: key not in self._waiting, self._unhashed))
            self._file.flush()
        if not ready:
            return
        with open(self._path, "rb") as file:
            file.seek(self._offsets[ready[0]])
            left = sum(self._specs[key].nbytes for key in ready)
            while left:
                block = file.read(min(left, _HASHED_AT_A_TIME))
                if not block:
                    raise OSError(errno.EIO, "another program has cut it short while it was written")
                self._digest.update(block)
                left -= len(block)
        for _ in ready:
            self._unhashed.popleft()

    def _finish(self) -> None:
        """Hash the rest of the data and put the hashes into the header."""
        self._hash()
        hashes = dict(zip(_NO_HASHES, (self._digest.hexdigest(), self._legacy_hash()), strict=True))
        header = _header(self._entries, self.metadata | hashes, self._data)
        if len(header) != self._data:
            raise ValueError("the final metadata need more room than those that were announced")
        self._file.seek(0)
        self._file.write(header)

    def _legacy_hash(self) -> str:
        """Return the SHA-256 over 64 KiB of the file as it would be with the ss_* metadata alone."""
        header = _header(self._entries, {key: value for key, value in self.metadata.items() if key.startswith("ss_")})
        begin = max(_LEGACY_HASHED.start - len(header), 0)
        end = max(_LEGACY_HASHED.stop - len(header), 0)
        with open(self._path, "rb") as file:
            file.seek(self._data + begin)
            data = file.read(end - begin)
        return hashlib.sha256(header[_LEGACY_HASHED.start : _LEGACY_HASHED.stop] + data).hexdigest()[:8]


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors that are at hand as a safetensors file, hashes included; goes together with `atomic_path`."""
    with TensorWriter(path, {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}, metadata) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def safetensors_size(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> int:
    """Return the bytes of the file that `TensorWriter` writes: 8, a JSON header padded to a multiple of 8, the data."""
    return len(_header(_entries(_in_file_order(specs)), {**metadata, **_NO_HASHES})) + sum(spec.nbytes for spec in specs.values())


def _in_file_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    by_dtype: dict[torch.dtype, list[str]] = {}
    for key, spec in specs.items():
        by_dtype.setdefault(spec.dtype, []).append(key)
    return {key: specs[key] for dtype in sorted(by_dtype, key=_ORDER.__getitem__) for key in sorted(by_dtype[dtype])}


def _entries(specs: Mapping[str, TensorSpec]) -> str:
    """Return the tensors as members of the header's JSON object."""
    header, offset = {}, 0
    for key, spec in specs.items():
        end = offset + spec.nbytes
        header[key] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (offset, end)}
        offset = end
    return _json(header)[1:-1]


def _header(entries: str, metadata: Mapping[str, str], least: int = 0) -> bytes:
    """Return length, JSON and padding, up to where the data begin: at least `least` bytes."""
    members = ['"__metadata__":' + _json(dict(sorted(metadata.items()))), *([entries] if entries else [])]
    text = ("{" + ",".join(members) + "}").encode()
    padded = max(-(-len(text) // 8) * 8, least - 8)
    return padded.to_bytes(8, "little") + text.ljust(padded)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
