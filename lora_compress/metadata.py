"""The metadata of a saved LoRA: kohya's ss_* keys kept true, and what was done to the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["finish_metadata"]

_OF_ONE_FILE = ("ss_compress_", "lora_compress_", "sshs_")


def finish_metadata(
    metadata: Mapping[str, str] | None, ranks: Iterable[int], alphas: Iterable[float], details: Mapping[str, Any]
) -> dict[str, str]:
    """Metadata of a compressed file: a copy of the host's, mended. The hashes are the writer's business.

    ss_network_dim and ss_network_alpha become the common rank and alpha, or "Dynamic" where they differ, as sd-scripts' own
    resize tool writes; `details` goes in as ss_compress_* keys, and those of an earlier compression go.

    Args:
        metadata: of the host or of the input.
        ranks: of the modules that the file holds.
        alphas: likewise.
        details: what was done; None is left out.
    """
    finished = {key: value for key, value in (metadata or {}).items() if not key.startswith(_OF_ONE_FILE)}
    truth = {"ss_network_dim": set(map(str, ranks)), "ss_network_alpha": set(map(str, alphas))}
    for key, values in truth.items():
        if key in finished:
            finished[key] = values.pop() if len(values) == 1 else "Dynamic"
    return finished | {f"ss_compress_{key}": _text(value) for key, value in details.items() if value is not None}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
