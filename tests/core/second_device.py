"""A second device for machines that have none: tensors that claim to be there, computed by the CPU.

    python -m core.second_device FOLDER

As on a GPU, an operation on tensors of both devices fails, and so does numpy on one of the second. Compresses a file in several
ways on either device and prints, as JSON, for each way digest, bytes and error of the two results, and how many operations the
second device ran.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from core.samples import kohya_file
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lora_compress import CompressionSettings, compress_file, open_lora
from lora_compress.weighting import Moments, save_calibration

DEVICE = "privateuseone:0"
WAYS: dict[str, dict[str, Any]] = {
    "rank": {"new_rank": 4},
    "fp8": {"rank_ratio": 0.5, "save_format": "fp8"},
    "error": {"target_error": 0.4},
    "channels": {"channel_threshold": 0.2, "bits": 8},
    "int4": {"bits": 4, "rank_ratio": 0.5},
    "mixed": {"bits": 5, "strategy": "mixed"},
    "entropy": {"strategy": "entropy", "target_error": 0.1},
    "progressive": {"strategy": "entropy", "bits": 3, "progressive": True},
}


class Elsewhere(Tensor):
    """A tensor of the second device around one of the CPU, `inner`."""

    inner: Tensor
    operations = 0

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made: Elsewhere = Tensor._make_wrapper_subclass(cls, inner.shape, device=torch.device(DEVICE), **like)
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """Which torch leaves to those who make such tensors."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(each: Any) -> Any:
            return each.inner if isinstance(each, cls) else each

        if func.overloadpacket is torch.ops.aten.copy_:
            inner(args[0]).copy_(inner(args[1]))
            return args[0]
        keywords = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, keywords)) if isinstance(each, Tensor)]
        transfer = func.overloadpacket is torch.ops.aten._to_copy
        if not transfer and any(each.ndim for each in tensors if not isinstance(each, cls)):
            raise RuntimeError(f"{func}: tensors are on two devices")
        target = keywords.get("device")
        if target is not None:
            keywords["device"] = "cpu"
        found = func(*tree_map(inner, args), **tree_map(inner, keywords))
        if target is not None and torch.device(target) != torch.device(DEVICE):
            return found
        Elsewhere.operations += not transfer
        known = {id(each.inner): each for each in tensors if isinstance(each, cls)}  # what worked in place gives itself back

        def outer(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            return known[id(each)] if id(each) in known else cls(each)

        return tree_map(outer, found)


def start() -> torch.library.Library:
    """Register the device; it lasts as long as what comes back."""
    _setup_privateuseone_for_python_backend()

    def empty(size: Any, dtype: torch.dtype | None = None, *_: Any, **__: Any) -> Elsewhere:
        return Elsewhere(torch.empty(size, dtype=dtype or torch.get_default_dtype()))

    def empty_strided(size: Any, stride: Any, dtype: torch.dtype | None = None, *_: Any, **__: Any) -> Elsewhere:
        return Elsewhere(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))

    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", lambda source, target, *_: (target.inner.copy_(source), target)[1], "PrivateUse1")
    return library


def both(source: Path, values: dict[str, Any], **more: Any) -> Iterator[tuple[str, int, float]]:
    """Digest, bytes and error of the results of the CPU and of the second device."""
    for device in ("cpu", DEVICE):
        settings = CompressionSettings.parse(values)
        object.__setattr__(settings, "quantization_device", device)  # parse knows only cpu and cuda
        target = source.with_name("result.safetensors")
        report = compress_file(source, target, settings, **more)
        assert report.status == "written", (values, more, report.bytes)
        yield hashlib.sha256(target.read_bytes()).hexdigest(), report.bytes[1], report.relative_error


def main(folder: Path) -> None:
    """See above."""
    source = kohya_file(folder / "lora.safetensors")
    tensors = load_file(source)
    repeated = next(key for key in tensors if key.endswith("lora_down.weight"))
    tensors[repeated][1] = tensors[repeated][0]  # no full rank: the slower decomposition
    save_file(tensors, source)
    calibration = folder / "calibration.safetensors"
    with open_lora(source) as lora:
        updates = dict(lora)
    moments = {name: Moments(torch.eye(update.rank) * 2 + 0.5) for name, update in updates.items()}
    first = next(iter(updates))
    moments[first] = Moments(diagonal=torch.arange(1.0, 1 + updates[first].down_matrix.shape[1]))
    save_calibration(calibration, updates, moments)
    told = {}
    library = start()
    for way, values in WAYS.items():
        for weighed in ({}, {"calibration": calibration})[: 1 if way == "channels" else 2]:
            Elsewhere.operations = 0
            told[way + ", calibrated" * bool(weighed)] = [*both(source, values, **weighed), Elsewhere.operations]
    del library
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
