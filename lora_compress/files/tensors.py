"""The tensors of a file of weights: types and shapes at once, numbers only when they are asked for."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import FormatError
from .dtypes import TensorSpec
from .header import read_header
from .pickled import load_pickled
from .recognition import is_safetensors
from .regular import open_regular, require_regular, same_file

__all__ = ["TensorFile", "open_safetensors", "open_tensors"]

_SAFETENSORS = (".safetensors", ".sft")
_LONGEST_KEY = 1000  # what examines names may then take the square of it
_UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)


class TensorFile(Mapping[str, TensorSpec]):
    """The tensors of one file by key, in the order in which they lie in it. Threads may read at the same time."""

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorSpec],
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str] | None = None,
        close: Callable[[], Any] | None = None,
    ) -> None:
        longest = max(infos, key=len, default="")
        if len(longest) > _LONGEST_KEY:
            raise FormatError(
                f"{path}: {longest[:40]}...: a key of {len(longest)} characters, allowed: {_LONGEST_KEY}: it is no LoRA"
            )
        self.path = path
        self.metadata = dict(metadata or {})
        self._infos = dict(infos)
        self._read = read
        self._close = close
        self._lock = threading.Lock()

    def __getitem__(self, key: str) -> TensorSpec:
        return self._infos[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, key: object) -> bool:
        return key in self._infos

    def read(self, key: str) -> Tensor:
        """Read one tensor.

        Raises:
            FormatError: the data cannot be read.
        """
        try:
            with self._lock:
                tensor = self._read(key)
            if TensorSpec.of(tensor) != self._infos[key]:
                raise ValueError(f"{tensor.dtype} {tuple(tensor.shape)} instead of {self._infos[key]}")
        except _UNREADABLE as error:
            raise FormatError(f"{self.path}: {key}: cannot be read ({error}): the file is damaged, get it again") from error
        return tensor

    def stored_bytes(self, key: str) -> int:
        """Return the bytes that a tensor takes in the file, with those of the scales that are needed to read it."""
        return self._infos[key].nbytes

    def precision(self, key: str) -> torch.dtype:
        """Return the type that a tensor should be written in again where no other is asked for."""
        return self._infos[key].dtype

    def close(self) -> None:
        """Let go of the file; tensors that were read stay valid."""
        if self._close is not None:
            self._close()


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Open a file of weights: .safetensors lazily, what torch.save wrote whole, through torch.load(weights_only=True).

    A safetensors file under the name of a PyTorch file (.pt, .bin, .ckpt ...) is read as what it is.

    Raises:
        FormatError: no such file, or neither of the two; the message says what it is where its first bytes tell it.
    """
    target = Path(path)
    require_regular(target)
    if target.suffix.lower() in _SAFETENSORS or is_safetensors(target):
        return open_safetensors(target)
    tensors, metadata = load_pickled(target)
    infos = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
    return TensorFile(target, infos, tensors.__getitem__, metadata)


def open_safetensors(path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda key: True) -> TensorFile:
    """Open the tensors of a safetensors file, or those of them that are wanted, without reading them.

    Tensors are read and not mapped: a process that touches a mapped file which another program cuts short ends with SIGBUS. The
    header is read as JSON, because asking safetensors' own reader for the shape of one tensor after another takes a second.

    Args:
        path: of the file.
        wanted: says of a key whether it is opened. The others may be of types that are not read here.

    Raises:
        FormatError: no such file, no safetensors file, or one that was cut short.
    """
    path = Path(path)
    header = read_header(path)
    if header.promised > header.available:
        found = f"cut short: its header promises {header.promised} bytes of data, the file has {header.available}"
        raise FormatError(f"{path}: {found}: get it again")
    in_order = sorted(header.tensors.items(), key=lambda item: (item[1].begin, item[0]))
    infos = {key: tensor.spec(path, key) for key, tensor in in_order if wanted(key)}
    places = {key: header.begin + header.tensors[key].begin for key in infos}
    data = _Stored(path, header.begin + header.promised, infos, places)
    return TensorFile(path, infos, data.read, header.metadata, data.close)


class _Stored:
    """Tensors in a file that stays open: another file under its name changes nothing, and each read checks that it is unchanged."""

    def __init__(self, path: Path, size: int, infos: Mapping[str, TensorSpec], places: Mapping[str, int]) -> None:
        self._file = open_regular(path)
        self._before = os.fstat(self._file.fileno())
        if self._before.st_size != size:
            self._file.close()
            raise FormatError(f"{path}: was changed by another program while it was opened: try again when that is done")
        self._infos, self._places = infos, places
        weakref.finalize(self, self._file.close)

    def read(self, key: str) -> Tensor:
        info, place = self._infos[key], self._places[key]
        if not info.numel:
            return torch.empty(info.shape, dtype=info.dtype)
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        self._file.seek(place)
        count = self._file.readinto(data.numpy().data)
        if count != info.nbytes or not same_file(self._before, os.fstat(self._file.fileno())):
            raise ValueError("another program has written to the file since it was opened")
        return data.view(info.dtype).reshape(info.shape)

    def close(self) -> None:
        self._file.close()
