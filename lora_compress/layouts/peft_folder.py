"""Folders that PEFT writes, adapter_config.json beside adapter_model.safetensors: read as one file, and written as a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError
from ..files.header import read_header
from .peft_config import CONFIG_NAME, PeftConfig, applies_to, text_of_config

__all__ = [
    "CONFIG_DETAIL",
    "CONFIG_NAME",
    "MAGNITUDE",
    "WEIGHTS_NAMES",
    "PeftTemplate",
    "metadata_of_file",
    "template_of",
    "weights_of",
]

WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")  # what PEFT loads, the first that is there
MAGNITUDE = "lora_magnitude_vector"  # of DoRA, in PEFT's keys
CONFIG_DETAIL = "adapter_config"  # under this detail of the metadata a single file remembers the configuration it came with
_METADATA_KEY = f"ss_compress_{CONFIG_DETAIL}"


def weights_of(path: str | os.PathLike[str]) -> Path:
    """The file of weights that a path stands for: the file itself, or the one that PEFT loads from a folder.

    Raises:
        FormatError: it is a folder without such a file.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in WEIGHTS_NAMES if (path / name).is_file()), None)
    if found is None:
        names = " or ".join(WEIGHTS_NAMES)
        raise FormatError(f"{path}: no such file: it is a folder without {names}: name a file, or a folder that PEFT wrote")
    return found


@dataclass(frozen=True)
class PeftTemplate:
    """A configuration that another one is made from: its text, and where it stands."""

    text: str
    source: str


def template_of(weights: Path, given: str | os.PathLike[str] | None = None) -> PeftTemplate | None:
    """The configuration that goes with a file of weights: `given`, beside the file, or remembered in its metadata.

    Raises:
        FormatError: it is there and is no LoRA configuration, or the weights are no safetensors file where they should be.
    """
    path = weights.with_name(CONFIG_NAME)
    if given is not None:
        path = Path(given) / CONFIG_NAME if os.path.isdir(given) else Path(given)
    elif not (applies_to(weights) and path.is_file()):
        remembered = metadata_of_file(weights).get(_METADATA_KEY)
        return PeftTemplate(remembered, f"{weights}: {_METADATA_KEY}") if remembered is not None else None
    text = text_of_config(path)
    PeftConfig.parse(text, str(path))
    return PeftTemplate(text, str(path))


def metadata_of_file(path: Path) -> Mapping[str, str]:
    """Return the metadata of a safetensors file, nothing of any other one."""
    if path.suffix.lower() not in (".safetensors", ".sft") or not path.is_file():
        return {}
    return read_header(path).metadata
