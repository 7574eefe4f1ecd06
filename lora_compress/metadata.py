"""The metadata of a saved LoRA: kohya's ss_* and sshs_* keys kept true, and what was done to the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor

from .update import LowRankUpdate

__all__ = ["finish_metadata", "model_hashes"]


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash and sshs_legacy_hash, by which A1111 knows a file: sha256 over the tensors with their ss_* keys."""
    blob = safetensors.torch.save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    data_start = 8 + int.from_bytes(blob[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(blob)[data_start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(blob[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8],
    }


def finish_metadata(
    metadata: Mapping[str, str] | None,
    tensors: Mapping[str, Tensor],
    updates: Mapping[str, LowRankUpdate],
    details: Mapping[str, Any],
) -> dict[str, str]:
    """Metadata of a compressed file: a copy of the host's, mended.

    ss_network_dim and ss_network_alpha become the common rank and alpha of `updates`, those that the file holds, or
    "Dynamic" where they differ, as sd-scripts' own resize tool writes; `details` goes in as ss_compress_* keys, and
    those of an earlier compression go; both hashes are taken anew.
    """
    finished = {key: value for key, value in (metadata or {}).items() if not key.startswith(("ss_compress_", "lora_compress_"))}
    truth = {
        "ss_network_dim": {str(update.rank) for update in updates.values()},
        "ss_network_alpha": {str(update.alpha) for update in updates.values()},
    }
    for key, values in truth.items():
        if key in finished:
            finished[key] = values.pop() if len(values) == 1 else "Dynamic"
    finished |= {f"ss_compress_{key}": _text(value) for key, value in details.items() if value is not None}
    return finished | model_hashes(tensors, finished)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
