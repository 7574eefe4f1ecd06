"""Files by path or by URL: local ones through the system, s3://, hf:// and the like through fsspec."""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

from ..errors import FormatError, LoraCompressError
from ..files.regular import open_regular, same_file
from ..files.writer import atomic_path
from ..layouts.peft_config import CONFIG_NAME, applies_to

__all__ = [
    "at_hand",
    "config_beside",
    "copy_file",
    "exists",
    "glob_files",
    "has_magic",
    "is_folder",
    "is_remote",
    "join",
    "open_binary",
    "readable",
    "writable",
]

Given = ParamSpec("Given")
Result = TypeVar("Result")

_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"}  # an upload appears whole or not at all


def _reaching(function: Callable[Concatenate[str, Given], Result]) -> Callable[Concatenate[str, Given], Result]:
    """One error for all that a service or the network may raise, of which each has its own: of a function of a path or URL."""

    @functools.wraps(function)
    def told(path: str, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return function(path, *args, **kwargs)
        except LoraCompressError:
            raise
        except Exception as error:
            if not is_remote(path):
                raise
            raise LoraCompressError(
                f"{path}: cannot be reached ({type(error).__name__}: {error}): check the address, the network and your credentials"
            ) from error

    return told


def is_remote(path: str) -> bool:
    """Whether `path` is a URL, such as s3://bucket/lora.safetensors."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path, re.IGNORECASE) is not None


def join(folder: str, place: str) -> str:
    """`place`, with forward slashes, under `folder`."""
    return f"{folder.rstrip('/')}/{place}" if is_remote(folder) else os.path.join(folder, *place.split("/"))


def config_beside(path: str) -> str:
    """Where the configuration of PEFT lies that belongs to a file of weights."""
    folder, slash, _ = path.replace(os.sep, "/").rpartition("/")
    return f"{folder}{slash}{CONFIG_NAME}"


def has_magic(path: str) -> bool:
    """Whether `path` holds a wildcard."""
    return glob.has_magic(path)


@_reaching
def is_folder(path: str) -> bool:
    """Whether `path` is a folder."""
    return _system(path).isdir(path) if is_remote(path) else os.path.isdir(path)


@_reaching
def exists(path: str) -> bool:
    """Whether there is a file at `path`."""
    return _system(path).isfile(path) if is_remote(path) else os.path.isfile(path)


@_reaching
def files_under(folder: str) -> list[str]:
    """All files in a folder and the folders in it, sorted."""
    if is_remote(folder):
        system = _system(folder)
        return sorted(_with_protocol(name, folder) for name in system.find(folder))
    return sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)


@_reaching
def glob_files(pattern: str) -> list[str]:
    """The files that match, sorted; ** goes through folders."""
    if not is_remote(pattern):
        return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    system = _system(pattern)
    found = system.glob(pattern, detail=True)
    return sorted(_with_protocol(name, pattern) for name, info in found.items() if info["type"] == "file")


@_reaching
def open_binary(path: str) -> IO[bytes]:
    """Open a file for reading; a remote one is read in blocks, as far as they are asked for.

    Raises:
        FormatError: a local one that is no regular file, or is not there.
    """
    return _system(path).open(path, "rb") if is_remote(path) else open_regular(path)


@contextlib.contextmanager
def readable(path: str) -> Iterator[str]:
    """A local path that holds what `path` holds: itself, or a download that is removed afterwards."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lora_compress_") as folder:
        local = os.path.join(folder, PurePosixPath(path).name)
        _download(path, local)
        if applies_to(Path(local)) and exists(beside := config_beside(path)):
            _download(beside, config_beside(local))
        yield local


@contextlib.contextmanager
def writable(path: str) -> Iterator[str]:
    """A local path to write to; a remote file takes its name when its upload is complete. What was not written is not uploaded."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lora_compress_") as folder:
        yield os.path.join(folder, PurePosixPath(path).name)
        for name in sorted(os.listdir(folder)):  # a packed file can have a partner
            _upload(f"{path.rpartition('/')[0]}/{name}", os.path.join(folder, name))


@contextlib.contextmanager
def at_hand(source: str, target: str) -> Iterator[tuple[str, str]]:
    """Local paths to read `source` from and to write `target` to; errors name what these stand for."""
    with readable(source) as local, writable(target) as out:
        try:
            yield local, out
        except LoraCompressError as error:
            error.args = (str(error).replace(local, source).replace(out, target),)
            raise


def copy_file(source: str, target: str) -> None:
    """Copy a file, whole or not at all.

    Raises:
        FormatError: it is not there, or another program wrote to it meanwhile.
    """
    with readable(source) as local, writable(target) as out, atomic_path(out) as temporary:
        with open_regular(local) as file, open(temporary, "wb") as copy:
            before = os.fstat(file.fileno())
            shutil.copyfileobj(file, copy)
            if not same_file(before, os.fstat(file.fileno())):
                raise FormatError(f"{source}: another program has written to the file while it was copied: try again")


@_reaching
def _download(url: str, local: str) -> None:
    _system(url).get_file(url, local)


@_reaching
def _upload(url: str, local: str) -> None:
    system = _system(url)
    folder, _, name = url.rpartition("/")
    system.makedirs(folder, exist_ok=True)
    if url.partition("://")[0].lower() in _ATOMIC:
        system.put_file(local, url)
        return
    temporary = f"{folder}/.{Path(name).stem}.{secrets.token_hex(8)}.tmp.safetensors"  # of this upload alone
    system.put_file(local, temporary)
    system.mv(temporary, url)


def _system(url: str) -> Any:
    try:
        fsspec: Any = importlib.import_module("fsspec")
    except ImportError:
        raise LoraCompressError(f"{url}: URLs are opened by fsspec, which is not installed: pip install fsspec") from None
    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise LoraCompressError(f"{url}: fsspec cannot open it ({error}): install what it names, or use a local path") from None


def _with_protocol(name: str, like: str) -> str:
    """A name as fsspec lists it, written as a URL; the path of file:// is absolute."""
    protocol = like.partition("://")[0]
    return f"{protocol}://{name if protocol == 'file' else name.lstrip('/')}"
