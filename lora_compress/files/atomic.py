"""Files that appear whole or not at all, however many programs write the same one at the same time."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError

from ..errors import SaveError
from .regular import kind_of

__all__ = ["atomic_path"]

_locking: ModuleType | None
try:
    import fcntl as _locking
except ImportError:  # Windows
    _locking = None

_STEM_BYTES = 100  # of the final name that the temporary one repeats: names have at most 255 bytes in all
_ABANDONED_AFTER = 86_400.0  # seconds without a write, where the file system has no locks that could tell
_ATTEMPTS = 100


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a new, empty file beside `path` to write to; on success it is renamed to `path`, otherwise removed.

    Each writer has a file of its own, `.<stem>.<16 hexadecimal digits>.tmp<suffix>`, which is created exclusively, so that no
    link is followed and no other writer's file is touched: of several writers, the last that completes gives `path` its content.
    The writer holds a lock (flock) on the file. What a killed writer left has no lock any more, and the next writer of the same
    name removes it; where the file system has no locks, it does so when nobody has written to the file for a day.

    Example:
        >>> with atomic_path("notes.txt") as temporary:
        ...     _ = temporary.write_text("whole or not at all")
        >>> Path("notes.txt").read_text()
        'whole or not at all'

    `path` may be absent, a regular file, or a link to one or to nothing. A link is replaced by the new file, and the file that it
    named stays as it is. A file that is replaced hands on its permissions; a new one gets those of the umask.

    Raises:
        SaveError: `path` is a folder, a FIFO, a device or a socket; the folder cannot be written, the disk is full, or
            whatever else the system says of it.
    """
    target = Path(path)
    temporary, descriptor = target, -1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_special(target)
        _remove_abandoned(target)
        temporary, descriptor = _create(target)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _keep_mode(target, temporary)
        if _locking is None:  # Windows renames no file that is open
            os.close(descriptor)
            descriptor = -1
        os.replace(temporary, target)
        temporary = target
    except SaveError:  # of another file that this one waits for
        raise
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"{target}: cannot be written ({_reason(error)}): free disk space or choose another output folder; "
            "whatever was there before is unchanged"
        ) from error
    finally:
        if _locking is None and descriptor >= 0:
            os.close(descriptor)
            descriptor = -1
        if temporary != target:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if descriptor >= 0:
            os.close(descriptor)


def _refuse_special(target: Path) -> None:
    """A device or a FIFO would be replaced by a file, which breaks whatever else uses it."""
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise SaveError(f"{target}: is {kind_of(mode)}: results are written to regular files alone: choose another name")


def _create(target: Path) -> tuple[Path, int]:
    """A new temporary file and the descriptor that holds its lock."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    for _ in range(_ATTEMPTS):
        temporary = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}.tmp{target.suffix}")
        try:
            descriptor = os.open(temporary, flags, 0o666)  # less the umask
        except FileExistsError:
            continue
        if _locking is None:
            return temporary, descriptor
        with suppress(OSError):  # a file system without locks
            _locking.flock(descriptor, _locking.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # another writer may have taken it for abandoned before it was locked
            return temporary, descriptor
        os.close(descriptor)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _remove_abandoned(target: Path) -> None:
    """Remove what killed writers of `target` left; whatever cannot be removed stays."""
    prefix, ending = _prefix(target), f".tmp{target.suffix}"
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            token = entry.name[len(prefix) : -len(ending)]
            ours = entry.name.startswith(prefix) and entry.name.endswith(ending) and len(token) == 16
            if ours and set(token) <= set("0123456789abcdef") and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(temporary: Path) -> None:
    age = time.time() - temporary.stat(follow_symlinks=False).st_mtime
    if _locking is None:
        if age > _ABANDONED_AFTER:
            temporary.unlink()
        return
    descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    with contextlib.closing(os.fdopen(descriptor, "rb+", buffering=0)):
        try:
            _locking.flock(descriptor, _locking.LOCK_EX | _locking.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES) or age <= _ABANDONED_AFTER:
                return  # its writer is alive, or nobody can tell
        temporary.unlink()


def _prefix(target: Path) -> str:
    """How the names of the temporary files of `target` begin."""
    return "." + os.fsencode(target.stem)[:_STEM_BYTES].decode("utf-8", "ignore") + "."


def _keep_mode(target: Path, temporary: Path) -> None:
    """Give the permissions of the file that is about to be replaced to its successor."""
    with suppress(OSError):
        before = target.lstat()
        if stat.S_ISREG(before.st_mode):
            os.chmod(temporary, stat.S_IMODE(before.st_mode) & 0o777)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
