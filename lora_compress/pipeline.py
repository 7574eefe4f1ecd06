"""Compress updates in memory, estimate what they will weigh, save them: the road from a network to a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .encoding import decode_module
from .errors import SettingsError
from .files import TensorSpec, atomic_path, safetensors_size, write_safetensors
from .job import Job, Stored
from .layouts import as_kohya, to_kohya
from .metadata import finish_metadata
from .packed import FORMAT_KEY, FORMAT_VERSION, packed_size, packed_tensors
from .plain import FP8
from .planning import plan
from .report import CompressionReport, PartReport
from .settings import CompressionSettings
from .update import LowRankUpdate

__all__ = ["CompressedLora", "compress", "estimate_size", "kohya_partner", "save"]


@dataclass(frozen=True)
class CompressedLora:
    """A compressed LoRA in memory.

    Args:
        updates: what a reader of the main file gets, by module; dropped modules are absent.
        tensors: of the main file.
        report: sizes and errors; its second size is that of the tensors, metadata apart.
        settings: what it was made with.
    """

    updates: dict[str, LowRankUpdate]
    tensors: dict[str, Tensor]
    report: CompressionReport
    settings: CompressionSettings


def compress(
    updates: Mapping[str, LowRankUpdate], settings: CompressionSettings, dtype: torch.dtype | None = None
) -> CompressedLora:
    """Prune and quantize `updates`: thin SVD of each, a choice over the whole file, then the codec or plain factors.

    Args:
        updates: by module name.
        settings: what to remove and how to store the rest.
        dtype: of plain factors (save_precision); None keeps float32. Packed files do not use it.

    Raises:
        FormatError: an update holds NaN or infinity.
        SettingsError: pruning leaves nothing, or the budget cannot be met.
    """
    job = Job(updates, settings, FP8 if settings.save_format == "fp8" else dtype or torch.float32)
    stored = plan(job, lambda found: _file_size(found)).stored
    if job.packed:
        tensors = packed_tensors("kohya", stored)
    else:
        tensors = as_kohya({name: module.plain for name, module in stored.items() if module.plain is not None})
    results = {name: _result(module) for name, module in stored.items()}
    modules = {name: _module_report(job, name, stored.get(name)) for name in updates}
    sizes = (_plain_size({name: (u, u.rank) for name, u in updates.items()}, dtype), _file_size(stored))
    return CompressedLora(results, tensors, CompressionReport.of_modules(modules, sizes), settings)
