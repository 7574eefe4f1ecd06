"""Joins our `networks` and `library` with those of sd-scripts; imported first by whatever of ours plugs into sd-scripts.

Both projects have folders of these two names. `networks` is a namespace package on both sides: it spans every folder of that name
on sys.path by itself. `library` is a regular package in sd-scripts (an empty __init__.py) and has none here, so theirs is imported
and our folder is appended to its search path. Appended, never put first: should names ever clash, upstream's file wins.

    import networks.sd_scripts_path  # noqa: F401
    # isort: split
    from library import compress_config, train_util
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from networks.sd_scripts_lookup import find_sd_scripts, is_checkout, remedy, sd_scripts_version

__all__ = ["find_sd_scripts", "is_checkout", "join", "sd_scripts_version"]

_OUR_LIBRARY = Path(__file__).resolve().parents[1] / "library"


def join() -> Path:
    """Makes the modules of both projects importable side by side and returns the root of sd-scripts. Idempotent.

    Also lets torchvision import beside a CPU-only torch (library/compress_torchvision.py), which sd-scripts needs at once.

    Raises:
        ModuleNotFoundError: sd-scripts is not to be found, or another package called `library` hides its own.
    """
    root = _running_root() or find_sd_scripts()
    if root is None:
        raise ModuleNotFoundError(f"sd-scripts is not to be found: {remedy()}", name="library.train_util")
    _put_on_path(root)
    library = _import_library(root)
    if _OUR_LIBRARY.is_dir() and not _is_among(_OUR_LIBRARY, library.__path__):
        library.__path__.append(str(_OUR_LIBRARY))
    from library.compress_torchvision import declare_missing_operators

    declare_missing_operators()
    return root


def _running_root() -> Path | None:
    """The sd-scripts that this process has loaded already, if it has: its trainer imported us, so no other one will do."""
    loaded = sys.modules.get("library")
    folders = [Path(entry).resolve().parent for entry in getattr(loaded, "__path__", ())]
    return next((folder for folder in folders if is_checkout(folder)), None)


def _put_on_path(root: Path) -> None:
    """Appends `root` to sys.path, or puts it just before another checkout that would otherwise be the one imported."""
    position = len(sys.path)
    for index, entry in enumerate(sys.path):
        folder = Path(entry or ".")
        if folder.is_dir() and os.path.samefile(folder, root):
            return
        if position == len(sys.path) and is_checkout(folder):
            position = index
    sys.path.insert(position, str(root))
    importlib.invalidate_caches()


def _import_library(root: Path) -> ModuleType:
    """Imports sd-scripts' regular package `library`, replacing a namespace that was made from our folder alone."""
    stale = sys.modules.get("library")
    if stale is not None and getattr(stale, "__file__", None) is None:
        del sys.modules["library"]
    library = importlib.import_module("library")
    if library is not stale:  # what was imported under the old package stays reachable as an attribute of the new one
        for name, module in list(sys.modules.items()):
            package, _, child = name.rpartition(".")
            if package == "library":
                setattr(library, child, module)
    if not _is_among(root / "library", library.__path__):
        raise ModuleNotFoundError(
            f"the package `library` at {next(iter(library.__path__), '?')} hides the one of sd-scripts at {root}: "
            "uninstall it, or take its folder off PYTHONPATH",
            name="library.train_util",
        )
    return library


def _is_among(folder: Path, entries: Iterable[str]) -> bool:
    return any(os.path.isdir(entry) and os.path.samefile(folder, entry) for entry in entries)


join()
