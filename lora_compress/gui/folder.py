"""The folder of uploads and results: it goes when the page ends, and with the next page if this one was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["own_folder"]

_PREFIX, _LOCK = "lora-compress-gui-", ".in_use"


@contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder, removed in the end; those that pages of this user left behind when they were killed are removed now.

    A page in use is known by the lock that it holds on a file in its folder, which the system takes away from a dead process.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if left.is_dir() and not left.is_symlink() and _is_ours(left) and not _is_in_use(left):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name, open(Path(name, _LOCK), "wb") as lock:
        _take(lock)
        yield Path(name)


def _is_ours(folder: Path) -> bool:
    return not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()


def _is_in_use(folder: Path) -> bool:
    try:
        with open(folder / _LOCK, "rb+") as lock:
            return not _take(lock)
    except FileNotFoundError:
        return False  # an older version made it, or it was killed at once
    except OSError:
        return True


def _take(lock: IO[bytes]) -> bool:
    """Lock a file until it is closed; False where another process has."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    return True
