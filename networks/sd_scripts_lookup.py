"""Finds a checkout of kohya-ss/sd-scripts and names its version; imports nothing of it and needs the standard library alone."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["COMMITS", "PINNED", "URL", "find_sd_scripts", "is_checkout", "remedy", "sd_scripts_version"]

URL = "https://github.com/kohya-ss/sd-scripts"
PINNED = "v0.11.1"
COMMITS = {
    "v0.11.1": "6721028c79ee85a78b3a06dfd8954dae310a1cce",
    "v0.10.1": "ae72efb92babe89ff8e70f057e42db68440e8d61",
    "v0.9.1": "8f4ee8fc343b047965cd8976fca65c3a35b7593a",
}

_PROJECT = Path(__file__).resolve().parents[1]

# Newest first: the first file that exists gives the series away where there is no git history to read.
_FEATURES = (
    ("library/args.py", "v0.11"),
    ("anima_train_network.py", "v0.10.1"),
    ("flux_train_network.py", "v0.10.0"),
    ("train_network.py", "v0.9 or older"),
)


def is_checkout(folder: Path) -> bool:
    """Whether `folder` holds sd-scripts: its network trainer and its library."""
    return (folder / "train_network.py").is_file() and (folder / "library" / "train_util.py").is_file()


def find_sd_scripts() -> Path | None:
    """The root of the first sd-scripts checkout that is found, or None.

    Looked for in this order: `$SD_SCRIPTS_DIR`; the working directory; `sys.path`; what the import finders know as `library`
    (an editable install of sd-scripts registers one); `sd-scripts/` in the project and beside it.

    Raises:
        ModuleNotFoundError: `$SD_SCRIPTS_DIR` is set and is not a checkout.
    """
    chosen = os.environ.get("SD_SCRIPTS_DIR")
    if chosen:
        root = Path(chosen).expanduser()
        if not is_checkout(root):
            raise ModuleNotFoundError(
                f"SD_SCRIPTS_DIR={chosen} is not a checkout of sd-scripts, it lacks train_network.py or library/train_util.py: "
                "point it at the folder that holds train_network.py, or unset it.",
                name="library.train_util",
            )
        return root.resolve()
    return next((folder.resolve() for folder in _candidates() if is_checkout(folder)), None)


def remedy() -> str:
    """One line that says how to get sd-scripts."""
    return f"set SD_SCRIPTS_DIR to a checkout of it, or: git clone {URL} && git -C sd-scripts checkout {PINNED}"


def sd_scripts_version(root: Path) -> str:
    """Names the version of the checkout at `root`: a tag if the commit is a known one, else the series its files belong to.

    sd-scripts itself carries no version number. Examples: `v0.11.1`, `v0.10.1 (commit 1a2b3c4)`, `v0.11`.
    """
    commit = _git_commit(root)
    for tag, known in COMMITS.items():
        if commit == known:
            return tag
    series = next((name for file, name in _FEATURES if (root / file).is_file()), "unknown version")
    return f"{series} (commit {commit[:7]})" if commit else series


def _candidates() -> Iterator[Path]:
    yield Path(".")
    yield from (Path(entry or ".") for entry in sys.path)
    yield from _known_to_finders()
    yield _PROJECT / "sd-scripts"
    yield _PROJECT.parent / "sd-scripts"


def _known_to_finders() -> Iterator[Path]:
    """The folders that hold a package `library`, asking every finder: a path finder's namespace must not hide an editable one."""
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec("library", None)
        except (AttributeError, ImportError, TypeError, ValueError):  # a finder of somebody else that knows nothing of it
            continue
        if spec is not None and spec.submodule_search_locations is not None:
            yield from (Path(location).parent for location in spec.submodule_search_locations)


def _git_commit(root: Path) -> str | None:
    """The commit that is checked out at `root`, read from git's files: works without git and whoever owns the folder."""
    try:
        git = root / ".git"
        if git.is_file():  # a submodule or a worktree: one line `gitdir: PATH`
            git = root / git.read_text(encoding="utf-8").partition(":")[2].strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        ref = head[len("ref: ") :]
        common = git / "commondir"
        store = git / common.read_text(encoding="utf-8").strip() if common.is_file() else git
        if (store / ref).is_file():
            return (store / ref).read_text(encoding="utf-8").strip()
        packed = (store / "packed-refs").read_text(encoding="utf-8")
        found = re.search(rf"^([0-9a-f]{{40}}) {re.escape(ref)}$", packed, flags=re.MULTILINE)
        return found[1] if found else None
    except (OSError, UnicodeDecodeError):
        return None
