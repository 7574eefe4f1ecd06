"""Which sd-scripts is found first, and what its version is called."""

from __future__ import annotations

import importlib.machinery
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from networks import sd_scripts_lookup as lookup


def _place(folder: Path) -> Path:
    """The two files that tell a checkout from any other folder."""
    (folder / "library").mkdir(parents=True)
    (folder / "library" / "train_util.py").touch()
    (folder / "train_network.py").touch()
    return folder.resolve()


class _EditableFinder:
    """What an editable install of sd-scripts leaves on sys.meta_path."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, name: str, path: object = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(self.root / "library")]
        return spec if name == "library" else None


def test_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All places hold one; taking away the winner makes the next in order win."""
    chosen, cwd, on_path, editable = (_place(tmp_path / name) for name in ("chosen", "cwd", "on_path", "editable"))
    inside, beside = _place(tmp_path / "home" / "project" / "sd-scripts"), _place(tmp_path / "home" / "sd-scripts")
    monkeypatch.setenv("SD_SCRIPTS_DIR", str(chosen))
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(on_path)])
    monkeypatch.setattr(sys, "meta_path", [object(), _EditableFinder(editable)])
    monkeypatch.setattr(lookup, "_PROJECT", tmp_path / "home" / "project")
    for expected in (chosen, cwd, on_path, editable, inside, beside):
        assert lookup.find_sd_scripts() == expected
        (expected / "train_network.py").unlink()
        monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)
    assert lookup.find_sd_scripts() is None


def test_a_wrong_choice_is_an_error_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_place(tmp_path / "cwd"))
    monkeypatch.setenv("SD_SCRIPTS_DIR", str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="is not a checkout of sd-scripts"):
        lookup.find_sd_scripts()


@pytest.mark.parametrize(
    ("sd_scripts_at", "series"),
    [("v0.11.1", "v0.11"), ("v0.10.1", "v0.10.1"), ("v0.9.1", "v0.9 or older")],
    indirect=["sd_scripts_at"],
)
def test_files_without_history_tell_the_series(sd_scripts_at: Path, series: str, tmp_path: Path) -> None:
    shutil.copytree(sd_scripts_at, tmp_path / "unpacked", ignore=shutil.ignore_patterns(".git"))
    assert lookup.sd_scripts_version(tmp_path / "unpacked") == series


def test_commit_is_the_one_that_git_reports(tmp_path: Path) -> None:
    """On a branch, packed and loose, in a worktree, and detached."""
    main, worktree = tmp_path / "main", tmp_path / "worktree"
    main.mkdir()
    _git(main, "init", "--quiet", "--initial-branch=dev/x")
    _git(main, "-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--allow-empty", "--message=first")
    commit = _git(main, "rev-parse", "HEAD")
    assert lookup._git_commit(main) == commit
    _git(main, "worktree", "add", "--quiet", "-b", "other", str(worktree))
    assert lookup._git_commit(worktree) == commit
    _git(main, "pack-refs", "--all")
    assert lookup._git_commit(main) == commit
    assert lookup._git_commit(worktree) == commit
    _git(main, "checkout", "--quiet", "--detach")
    assert lookup._git_commit(main) == commit
    assert lookup._git_commit(tmp_path) is None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
