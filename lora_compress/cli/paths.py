"""Check where a command will write before it works for minutes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..batch.storage import exists, is_remote
from ..files.regular import have_same_path
from ..layouts.peft_folder import template_of, weights_of
from .arguments import UsageError

__all__ = ["check_input", "check_output", "is_adapter_output", "names_a_file"]

# Endings by which people and programs tell what a file is. Any other ending is part of a name: v1.5, style.fp16, my.lora.
_FILE_SUFFIXES = (
    *(".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".npz", ".npy", ".h5", ".onnx", ".gguf", ".msgpack"),
    *(".json", ".jsonl", ".toml", ".yaml", ".yml", ".txt", ".md", ".csv", ".log", ".html", ".htm", ".xhtml", ".pdf", ".py"),
    *(".zip", ".7z", ".rar", ".tar", ".gz", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg"),
)
_URL = "is a URL, which only compressing reads and writes"


def check_input(path: str | None, flag: str = "--model", *, remote: bool = False) -> str:
    """The path of an input file, or with `remote` its URL.

    Raises:
        UsageError: it was not given, or there is no such file.
    """
    if not path:
        raise UsageError(f"{flag}: is missing: name the LoRA file to read, {flag} lora.safetensors")
    if is_remote(path) and not remote:
        raise UsageError(f"{flag} {path}: {_URL}: download the file first")
    if not (exists(path) if is_remote(path) else os.path.exists(path)):
        raise UsageError(f"{flag} {path}: no such file: check the path, and put paths with spaces in quotes")
    return path


def check_output(
    path: str | None,
    inputs: Iterable[str] = (),
    *,
    flag: str = "--save_to",
    suffix: str = ".safetensors",
    force: bool = False,
    remote: bool = False,
) -> str:
    """Return the path of an output file, whose folder can be written and which is none of `inputs`.

    A name without a known file ending gets `suffix`: "v1.5" means "v1.5.safetensors". A file that exists under this name is
    overwritten, as sd-scripts' tools do, but an input only with `force`. With `remote` it may be a URL.

    Raises:
        UsageError: anything of that does not hold.
    """
    if not path:
        raise UsageError(f"{flag}: is missing: name the file to write, {flag} out{suffix}")
    if is_remote(path) and not remote:
        raise UsageError(f"{flag} {path}: {_URL}: write a local file")
    target = Path(path)
    if target.name == suffix:
        raise UsageError(f"{flag} {path}: the file has no name, only an ending: write {path.removesuffix(suffix)}my_lora{suffix}")
    if target.is_dir():
        raise UsageError(f"{flag} {path}: is a folder: name the file in it, {target / ('my_lora' + suffix)}")
    if path.endswith(("/", os.sep)):
        raise UsageError(f"{flag} {path}: names a folder: name the file in it, {path}my_lora{suffix}")
    if not path.endswith(suffix):
        if names_a_file(path):
            raise UsageError(f"{flag} {path}: must end with {suffix}: write {os.path.splitext(path)[0]}{suffix}")
        return check_output(path + suffix, inputs, flag=flag, suffix=suffix, force=force, remote=remote)
    if not is_remote(path):
        check_folder(target.parent, f"{flag} {path}")
    for given in inputs:
        if not force and have_same_path(given, path):
            raise UsageError(f"{flag} {path}: is the input: choose another name, or allow overwriting it with --force")
    return path


def is_adapter_output(path: str | None, source: str, peft_config: str | None, *, packed: bool = False) -> bool:
    """Whether an output path means a folder for PEFT: the input has an adapter_config.json, and the path names no file.

    Args:
        path: as given with --save_to.
        source: the input: a file, or a folder that PEFT wrote.
        peft_config: the configuration that was stated with --peft_config.
        packed: whether a packed file is written, for which a name without an ending is that of a file.
    """
    if not path or is_remote(path) or is_remote(source) or path.endswith(".safetensors"):
        return False
    folder = os.path.isdir(path) or path.endswith(("/", os.sep))
    if not folder and (packed or names_a_file(path)):
        return False
    return template_of(weights_of(source), peft_config) is not None


def names_a_file(path: str) -> bool:
    """Whether a path ends with an ending of files, such as .ckpt, and not with a part of a name, such as .5 of v1.5."""
    return os.path.splitext(path)[1].lower() in _FILE_SUFFIXES


def check_folder(folder: Path, subject: str) -> None:
    """Check that `folder` can be written, or made.

    Raises:
        UsageError: naming `subject`.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"{subject}: {existing} is a file, not a folder: choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{subject}: the folder {existing} cannot be written: choose another one or change its permissions")
