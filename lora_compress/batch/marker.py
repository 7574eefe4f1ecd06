"""What an output was made from and how, as one short text in its own metadata: a batch that goes on knows by it what is done."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ..errors import FormatError
from ..files.header import metadata_of, verify_data
from ..files.regular import size_of, written_at
from ..layouts.peft_config import applies_to
from .jobs import CompressOptions
from .storage import config_beside, exists, is_remote, open_binary

__all__ = ["MARKER_KEY", "MARKER_NAME", "fingerprint", "is_done", "is_ours", "make_marker", "same_content"]

MARKER_NAME = "made_from"
MARKER_KEY = f"ss_compress_{MARKER_NAME}"
_BLOCKS, _BLOCK_BYTES = 16, 16384
_COMPARED_BYTES = 1 << 20


def fingerprint(path: str) -> str:
    """SHA-256 over the length of a file and 16 blocks of 16 KiB, spread evenly from its first byte to its last.

    A training changes nearly every byte of a LoRA, so that a few blocks tell two apart; whole files of a large collection
    would take minutes to read.
    """
    with open_binary(path) as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for block in range(_BLOCKS):
            file.seek(max(size - _BLOCK_BYTES, 0) * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def make_marker(source: str, options: CompressOptions) -> str:
    """32 hexadecimal digits that stand for this input and these settings; where the work is done does not count."""
    settings = {**options.settings.as_dict(), "quantization_device": None}
    del settings["allow_larger"]  # decides whether there is a file, not what is in it
    others = [fingerprint(path) if path else "" for path in (options.base_model, options.calibration)]
    how = [settings, str(options.save_dtype), sorted(options.consumers), options.repair, others]
    stated = [options.alpha, fingerprint(options.peft_config) if options.peft_config else None]
    config = config_beside(source)
    if any(stated) or (applies_to(Path(source)) and exists(config)):
        how += [*stated, fingerprint(config) if exists(config) else None]
    text = fingerprint(source) + json.dumps(how, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_done(source: str, target: str, marker: str, partner: bool = False) -> bool:
    """Whether `target` was made from this input with these settings, is whole, and is no older than the input.

    The marker in its metadata says what it was made from. Its size must be the one that its header tells, and its data must
    have the SHA-256 that was written with them. Of a remote file the data would have to be downloaded: there the size alone counts.

    Args:
        source: the input.
        target: the output.
        marker: from `make_marker`.
        partner: whether the kohya file beside the output is part of the result, and has to pass the same checks.
    """
    targets = (target, target.removesuffix(".safetensors") + ".kohya.safetensors")[: 1 + partner]
    return all(_is_made(source, each, marker) for each in targets)


def _is_made(source: str, target: str, marker: str) -> bool:
    if not exists(target):
        return False
    metadata = _metadata(target)
    if metadata.get(MARKER_KEY) != marker:
        return False
    try:
        if not (is_remote(source) or is_remote(target)) and written_at(target) < written_at(source):
            return False
        with open_binary(target) as file:
            verify_data(file, Path(target), None if is_remote(target) else metadata.get("sshs_model_hash"))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):  # a damaged header among them
        return False
    return True


def same_content(one: str, other: str) -> bool:
    """Whether two files hold the same bytes; of remote ones the fingerprints are compared."""
    if is_remote(one) or is_remote(other):
        return fingerprint(one) == fingerprint(other)
    if size_of(one) != size_of(other):
        return False
    with open_binary(one) as first, open_binary(other) as second:
        while block := first.read(_COMPARED_BYTES):
            if block != second.read(_COMPARED_BYTES):
                return False
    return True


def is_ours(target: str) -> bool:
    """Whether `target` was written by this program."""
    return any(key.startswith(("ss_compress_", "lora_compress")) for key in _metadata(target))


def _metadata(path: str) -> dict[str, str]:
    """The metadata of a safetensors file; nothing of what is none."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with open_binary(path) as file:
            return metadata_of(file, Path(path))
    except (FormatError, OSError):
        return {}
