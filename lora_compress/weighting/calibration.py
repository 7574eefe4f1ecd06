"""The calibration file: second moments of the inputs of every module, bound to the LoRA they were taken on.

A safetensors file. Module NAME has NAME.gram (r, r) = E[(down x)(down x)^T], or NAME.diagonal (in * kernel,) or (in,) = E[x^2],
or both, in float32. The metadata holds lora_compress.calibration = "1" and lora_compress.digests, a JSON object that gives for each
NAME the digest of the factors it was taken on (`factors_digest`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FormatError
from ..files.tensors import open_safetensors
from ..files.writer import atomic_path
from ..update import LowRankUpdate
from .activation import diagonal_gram

__all__ = ["Calibration", "Moments", "factors_digest", "save_calibration"]

_VERSION_KEY, _DIGESTS_KEY, _VERSION = "lora_compress.calibration", "lora_compress.digests", "1"


@dataclass(frozen=True)
class Moments:
    """Second moments of one module's inputs x; at least one of the two.

    Args:
        gram: (r, r), E[(down x)(down x)^T].
        diagonal: (in * kernel,) or (in,), E[x^2].
    """

    gram: Tensor | None = None
    diagonal: Tensor | None = None


def factors_digest(update: LowRankUpdate) -> str:
    """128 bits of SHA-256, in hex, over dtype, shape and bytes of down and up as they are stored; alpha is not part of it."""
    digest = hashlib.sha256()
    for tensor in (update.down, update.up):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def save_calibration(path: str | os.PathLike[str], updates: Mapping[str, LowRankUpdate], moments: Mapping[str, Moments]) -> None:
    """Write the calibration of a LoRA.

    Args:
        path: of the file; replaced as a whole.
        updates: the modules as they stand in the LoRA file, in its dtype: the file is bound to them.
        moments: by module name; modules without any may be left out.

    Raises:
        FormatError: moments of a module that is not in `updates`, or that do not fit it.
    """
    tensors, digests = {}, {}
    for name, each in moments.items():
        if name not in updates:
            raise FormatError(f"{name}: moments of a module that the LoRA does not have")
        for kind, tensor in (("gram", each.gram), ("diagonal", each.diagonal)):
            if tensor is not None:
                tensors[f"{name}.{kind}"] = tensor.detach().to("cpu", torch.float32).contiguous().clone()
        _gram_of(name, updates[name], each)
        digests[name] = factors_digest(updates[name])
    metadata = {_VERSION_KEY: _VERSION, _DIGESTS_KEY: json.dumps(digests)}
    with atomic_path(Path(path)) as beside:
        save_file(tensors, beside, metadata)


class Calibration:
    """A calibration file, read module by module.

    Args:
        path: of the file.

    Raises:
        FormatError: not a calibration file, or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open_safetensors(self.path)
        metadata = self._file.metadata
        version = metadata.get(_VERSION_KEY)
        if version != _VERSION:
            found = "no calibration file" if version is None else f"a calibration file of version {version}"
            raise FormatError(f"{path}: {found}, {_VERSION_KEY}={_VERSION} is expected: record one with this version")
        try:
            digests = json.loads(metadata.get(_DIGESTS_KEY, ""))
        except ValueError:
            digests = None
        if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
            raise FormatError(f"{path}: {_DIGESTS_KEY} in its metadata is damaged: record the calibration anew")
        self._digests: dict[str, str] = digests

    def __contains__(self, name: object) -> bool:
        return name in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def gram(self, name: str, update: LowRankUpdate) -> Tensor:
        """G of a module, (r, r), float64: as recorded, or from the diagonal where only that was recorded.

        Raises:
            FormatError: the file has no such module, was recorded on other weights, or holds moments that do not fit.
        """
        if name not in self:
            raise FormatError(
                f"{self.path}: has no moments of {name}: it belongs to another LoRA, or record it anew with this module"
            )
        if self._digests[name] != factors_digest(update):
            raise FormatError(f"{self.path}: was recorded on other weights of {name}: record the calibration on this very file")
        keys = {kind: f"{name}.{kind}" for kind in ("gram", "diagonal")}
        read = {kind: self._file.read(key) for kind, key in keys.items() if key in self._file}
        return _gram_of(f"{self.path}: {name}", update, Moments(**read))


def _gram_of(where: str, update: LowRankUpdate, moments: Moments) -> Tensor:
    if moments.gram is not None:
        gram = moments.gram.double()
        if tuple(gram.shape) != (update.rank, update.rank) or not bool(torch.isfinite(gram).all()):
            raise FormatError(f"{where}: a Gram matrix {tuple(gram.shape)} that does not fit rank {update.rank}, or is not finite")
        return gram
    if moments.diagonal is None:
        raise FormatError(f"{where}: neither a gram nor a diagonal: record the calibration anew")
    try:
        return diagonal_gram(update, moments.diagonal)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
