"""Check where a command will write before it works for minutes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..batch.storage import exists, is_remote
from .arguments import UsageError

__all__ = ["check_input", "check_output", "is_same_file"]

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
    """The path of an output file: it has a name with the right ending, its folder can be written, it is none of `inputs`.

    A file that stands there is overwritten, as sd-scripts' tools do, but an input only with `force`. With `remote` it may be a URL.

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
    if target.suffix != suffix:
        raise UsageError(f"{flag} {path}: must end with {suffix}: write {os.path.splitext(path.rstrip('/' + os.sep))[0]}{suffix}")
    if not is_remote(path):
        check_folder(target.parent, f"{flag} {path}")
    for given in inputs:
        if not force and is_same_file(given, path):
            raise UsageError(f"{flag} {path}: is the input: choose another name, or allow overwriting it with --force")
    return path


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


def is_same_file(one: str, other: str) -> bool:
    """Whether two paths name one file, through links too."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.abspath(one) == os.path.abspath(other)
