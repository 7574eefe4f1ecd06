"""The end of a test run: what ran against the real sd-scripts, what was skipped and why, and when that is a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

_CHANGED = ("SD_SCRIPTS_DIR", "REQUIRE_SD_SCRIPTS", "REQUIRE_LISTED_SKIPS", "PYTHONPATH")

SUITE = """
import pytest

@pytest.mark.parametrize("sd_scripts_at", ["v0.10.1", "v0.9.1"], indirect=True)
@pytest.mark.parametrize("number", [0, 1])
def test_older(sd_scripts_at, number): pass

def test_main(sd_scripts): pass
def test_free(): pass

@pytest.mark.skip(reason="for another reason")
def test_skipped(sd_scripts): pass
"""


def _run_suite(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs SUITE under our conftest.py, in a project that has no sd-scripts of its own."""
    (folder / "tests").mkdir(parents=True)
    (folder / "networks").mkdir()
    for name in ("conftest.py", "skips.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    for name in ("sd_scripts_lookup.py", "sd_scripts_path.py"):
        shutil.copy(ROOT / "networks" / name, folder / "networks")
    shutil.copytree(ROOT / "library", folder / "library")
    (folder / "tests" / "test_suite.py").write_text(SUITE)
    kept = {name: value for name, value in os.environ.items() if name not in _CHANGED} | {"LORA_COMPRESS_TEST_ALL": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "pythonpath=. tests",
        "--rootdir",
        str(folder),
        *options,
        "tests",
    ]
    return subprocess.run([*command, *options, "tests"], cwd=folder, env=kept | environment, capture_output=True, text=True)


def test_without_sd_scripts_tests_skip_and_are_counted(tmp_path: Path) -> None:
    done = _run_suite(tmp_path / "project")
    assert done.returncode == 0, done.stdout
    pytests, ours = done.stdout.splitlines()[-2:]
    assert "1 passed, 6 skipped in" in pytests
    assert ours == "sd-scripts: tests run: none; 5 skipped for want of it"


def test_required_sd_scripts_turns_each_such_skip_into_a_failure(tmp_path: Path) -> None:
    done = _run_suite(tmp_path / "project", REQUIRE_SD_SCRIPTS="1")
    assert done.returncode == 1
    assert "1 passed, 1 skipped, 5 errors in" in done.stdout.splitlines()[-2]


def test_skips_are_listed_by_reason(tmp_path: Path) -> None:
    done = _run_suite(tmp_path / "project")
    listed = done.stdout.partition("skipped tests, by reason")[2].splitlines()[1:]
    place = next(number for number, line in enumerate(listed) if line.startswith("not on the list in tests/skips.py"))
    assert [line.split()[0] for line in listed[:place] if "sd-scripts is absent" in line] == ["2", "2", "1"]
    assert listed[place + 1].split(maxsplit=1) == ["1", "for another reason"]
    assert listed[place + 2].startswith("=")


def test_a_skip_that_is_not_on_the_list_fails_the_run_where_the_list_is_binding(tmp_path: Path) -> None:
    assert _run_suite(tmp_path / "first", REQUIRE_LISTED_SKIPS="1").returncode == 1
    listed = _run_suite(tmp_path / "second", "-k", "not test_skipped", REQUIRE_LISTED_SKIPS="1")
    assert listed.returncode == 0, listed.stdout
    assert "1 passed, 5 skipped, 1 deselected in" in listed.stdout.splitlines()[-2]


@pytest.mark.smoke
@pytest.mark.parametrize("sd_scripts_at", ["v0.10.1"], indirect=True)
def test_with_sd_scripts_the_versions_are_named(sd_scripts_at: Path, tmp_path: Path) -> None:
    done = _run_suite(tmp_path / "project", SD_SCRIPTS_DIR=str(sd_scripts_at))
    assert done.stdout.splitlines()[-1] == "sd-scripts: tests run: 3 against v0.10.1; 2 skipped for want of it"


def test_processes_count_together_what_they_ran_and_skipped(tmp_path: Path) -> None:
    done = _run_suite(tmp_path / "project", "-n", "2", REQUIRE_LISTED_SKIPS="1")
    assert done.returncode == 1, done.stdout
    assert "1 passed, 6 skipped in" in done.stdout and "1  for another reason" in done.stdout
    assert done.stdout.splitlines()[-1] == "sd-scripts: tests run: none; 5 skipped for want of it"


def test_what_takes_long_is_left_to_another_command(tmp_path: Path) -> None:
    done = _run_suite(tmp_path / "project", LORA_COMPRESS_TEST_ALL="0")
    assert "1 passed, 6 skipped in" in done.stdout and "4  `bootstrap.py test --all` runs it" in done.stdout
