"""Inputs must be regular files: reading a FIFO could wait for ever, and a device gives bytes without end."""

from __future__ import annotations

import os
import stat
from io import BufferedReader

from ..errors import FormatError

__all__ = ["have_same_path", "kind_of", "open_regular", "require_regular", "same_file", "size_of", "written_at"]

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def kind_of(mode: int) -> str:
    """Return in words what a file of this mode (`os.stat_result.st_mode`) is."""
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


def require_regular(path: str | os.PathLike[str], mode: int | None = None) -> None:
    """Refuse a path that names no regular file; a link to one is fine.

    Args:
        path: to look at.
        mode: of the file, where it is known already.

    Raises:
        FormatError: there is no such file, or it is a folder, a FIFO, a device or a socket.
    """
    try:
        mode = os.stat(path).st_mode if mode is None else mode
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path}: is {kind_of(mode)}: only regular files are read: give the path of a file")


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading bytes; nothing else is opened for longer than it takes to see what it is.

    The file is opened without waiting and looked at through its descriptor, so that it cannot be exchanged in between.

    Raises:
        FormatError: as `require_regular`; the file may not be read.
    """
    require_regular(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        require_regular(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def size_of(path: str | os.PathLike[str]) -> int:
    """Return the bytes of a file.

    Raises:
        FormatError: it is not there any more.
    """
    return _state_of(path).st_size


def written_at(path: str | os.PathLike[str]) -> int:
    """Return when a file was last written to, nanoseconds.

    Raises:
        FormatError: it is not there any more.
    """
    return _state_of(path).st_mtime_ns


def _state_of(path: str | os.PathLike[str]) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}): another program has removed it") from None


def have_same_path(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file, through links too; of a file that is not there, whether the paths are the same."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.abspath(one) == os.path.abspath(other)


def same_file(before: os.stat_result, now: os.stat_result) -> bool:
    """Whether a file is still the one that it was, and nobody has written to it."""
    return (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns) == (
        now.st_dev,
        now.st_ino,
        now.st_size,
        now.st_mtime_ns,
    )
