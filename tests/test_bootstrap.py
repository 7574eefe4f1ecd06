"""bootstrap.py: what is reused, what is made anew, and what it says when something is missing. No network is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bootstrap

ROOT = Path(__file__).resolve().parents[1]


def _requirements(folder: Path) -> Path:
    """dev.txt includes run.txt, both are constrained; what they name is installed wherever this test runs."""
    (folder / "constraints.txt").write_text("")
    (folder / "run.txt").write_text("-c constraints.txt\npluggy\n")
    (folder / "dev.txt").write_text("-c constraints.txt\n-r run.txt\npytest\n")
    return folder / "dev.txt"


def test_second_installation_is_skipped_until_a_file_changes(tmp_path: Path) -> None:
    wanted, stamp, python = _requirements(tmp_path), tmp_path / "stamp", Path(sys.executable)
    assert bootstrap.install(wanted, python, stamp)
    assert not bootstrap.install(wanted, python, stamp)
    assert not bootstrap.install(tmp_path / "run.txt", python, stamp), "dev.txt had installed run.txt"
    (tmp_path / "constraints.txt").write_text("# another pin\n")
    assert bootstrap.install(tmp_path / "run.txt", python, stamp)
    assert bootstrap.install(wanted, python, stamp), "run.txt alone does not install dev.txt"


def test_failed_installation_is_not_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, stamp = _requirements(tmp_path), tmp_path / "stamp"
    bootstrap.install(wanted, Path(sys.executable), stamp)
    wanted.write_text("no-such-distribution-of-lora-compress\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(bootstrap.BootstrapError, match="pip failed"):
        bootstrap.install(wanted, Path(sys.executable), stamp)
    assert not stamp.exists()


def test_broken_environment_is_made_anew_and_a_working_one_kept(tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    python = bootstrap.make_environment(folder)
    marker = folder / "marker"
    marker.touch()
    assert bootstrap.make_environment(folder) == python
    assert marker.exists()
    python.unlink()
    assert bootstrap.make_environment(folder) == python
    assert not marker.exists()
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_current_environment_is_told_what_it_lacks(tmp_path: Path) -> None:
    wanted = _requirements(tmp_path)
    bootstrap.check_installed(wanted)
    wanted.write_text("pytest\nno-such-distribution\n-r run.txt\n# a comment\n")
    with pytest.raises(
        bootstrap.BootstrapError, match=r'lacks 1 packages.*-m pip install -c ".*constraints.txt" no-such-distribution$'
    ):
        bootstrap.check_installed(wanted)


def test_every_check_runs_and_any_failure_fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    checks = (("first", ["-c", "raise SystemExit(3)"]), ("second", ["-c", "print('second ran')"]))
    monkeypatch.setattr(bootstrap, "CHECKS", checks)
    assert bootstrap._run_tests(Path(sys.executable), ["--version"], dict(os.environ)) == 1
    output = capfd.readouterr().out
    assert "second ran" in output
    assert output.endswith("failed: first\n")
    monkeypatch.setattr(bootstrap, "CHECKS", checks[1:])
    assert bootstrap._run_tests(Path(sys.executable), ["--version"], dict(os.environ)) == 0
    assert bootstrap._run_tests(Path(sys.executable), ["--no-such-option"], dict(os.environ)) == 1


def test_started_programs_find_the_environment_and_sd_scripts(tmp_path: Path) -> None:
    environment = bootstrap._environment(tmp_path / "bin" / "python", tmp_path / "sd")
    assert environment["PATH"].split(os.pathsep)[0] == str(tmp_path / "bin")
    assert environment["SD_SCRIPTS_DIR"] == str(tmp_path / "sd")


@pytest.mark.parametrize(
    ("arguments", "verb", "kind", "passed_on"),
    [
        (["test"], "test", "venv", []),
        (["test", "-k", "name", "-x"], "test", "venv", ["-k", "name", "-x"]),
        (["--python-env", "current", "demo", "--steps", "3"], "demo", "current", ["--steps", "3"]),
        (["demo", "--python-env", "current", "--", "--help"], "demo", "current", ["--help"]),
    ],
)
def test_command_line(arguments: list[str], verb: str, kind: str, passed_on: list[str]) -> None:
    options, rest = bootstrap._parse(arguments)
    assert (options.verb, options.python_env, rest) == (verb, kind, passed_on)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["paint"], 2, "invalid choice: 'paint'"),
        (["demo"], 1, "bootstrap: error: SD_SCRIPTS_DIR="),
        (["test"], 1, "bootstrap: error: SD_SCRIPTS_DIR="),
    ],
)
def test_wrong_input_is_one_clear_line(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bootstrap.py"), *arguments]
    done = subprocess.run(command, env=os.environ | {"SD_SCRIPTS_DIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == code
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sd_scripts_at", ["v0.11.1"], indirect=True)
def test_clone_is_complete_or_absent(sd_scripts_at: Path, tmp_path: Path) -> None:
    """From the real repository, over what an interrupted run and a failed one have left."""
    target = tmp_path / "sd-scripts"
    (tmp_path / "sd-scripts.partial" / ".git").mkdir(parents=True)
    target.mkdir()
    (target / "mine.txt").touch()
    bootstrap.clone(bootstrap.COMMITS["v0.11.1"], target, url=str(sd_scripts_at))
    assert bootstrap.sd_scripts_version(target) == "v0.11.1"
    assert {path.name for path in target.iterdir() if path.is_dir()} == {".git", "library", "networks", "tools"}
    assert (tmp_path / "sd-scripts.incomplete-1" / "mine.txt").exists()
    assert not (tmp_path / "sd-scripts.partial").exists()


def test_unreachable_source_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(bootstrap.SourceError, match="set SD_SCRIPTS_DIR to a checkout"):
        bootstrap.clone("0" * 40, tmp_path / "sd-scripts", url=str(tmp_path / "nowhere"))
    assert not list(tmp_path.iterdir())


def test_missing_git_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(bootstrap.SourceError, match="without git: install git"):
        bootstrap.clone("0" * 40, tmp_path / "sd-scripts")


@pytest.mark.parametrize(
    ("verb", "told"), [("demo", "The demo trains with diffusers instead"), ("test", "Tests that need it are skipped")]
)
def test_without_sd_scripts_it_says_what_is_done_instead(
    verb: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> Path:
        raise bootstrap.SourceError("sd-scripts cannot be had")

    monkeypatch.setattr(bootstrap, "obtain_sd_scripts", absent)
    monkeypatch.setattr(bootstrap, "find_sd_scripts", lambda: None)
    assert bootstrap._sd_scripts_for(verb) is None
    assert f"sd-scripts cannot be had. {told}." in capsys.readouterr().out
