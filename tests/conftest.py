"""What all tests share: the checkouts of sd-scripts, the closing count of the tests that ran against them, and that of the skips.

`sd_scripts` is the checkout that a user would get; its `networks` and `library` are joined with ours when a test receives it:

    def test_something(sd_scripts: Path) -> None:
        from networks import lora

`sd_scripts_at` is that of a given version; nothing is joined, start a subprocess:

    @pytest.mark.parametrize("sd_scripts_at", ["v0.10.1", "v0.11.1"], indirect=True)
    def test_something_else(sd_scripts_at: Path) -> None:

Where sd-scripts is absent such tests skip and say what to set. REQUIRE_SD_SCRIPTS=1 makes each of these skips a failure.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from skips import is_allowed, is_required, summary

from networks.sd_scripts_lookup import COMMITS, PINNED, find_sd_scripts, is_checkout, remedy, sd_scripts_version

ROOT = Path(__file__).resolve().parents[1]
_ABSENT = "sd-scripts is absent"
_THOROUGH = "`bootstrap.py test --all`"
_VERSIONS = "sd-scripts versions"
_ran: Counter[str] = Counter()
_skips: list[str] = []  # the reason of every skip


@pytest.fixture(scope="session")
def sd_scripts() -> Path:
    """The root of sd-scripts, importable in this process beside our modules."""
    root = find_sd_scripts()
    if root is None:
        _absent(f"{_ABSENT}: {remedy()}")
    importlib.import_module("networks.sd_scripts_path")
    return root


@pytest.fixture(scope="session")
def sd_scripts_at(request: pytest.FixtureRequest) -> Path:
    """The root of sd-scripts at the version that the test is parametrized with."""
    root = _checkout_of(request.param)
    if root is None:
        folder = f".sd-scripts-versions/{request.param}"
        _absent(
            f"{_ABSENT} at {request.param}: python bootstrap.py test gets it, or check out {COMMITS[request.param]} in {folder}"
        )
    return root


@pytest.fixture(scope="session")
def real_lora() -> Callable[[str], Path]:
    """The path of a real LoRA file by its name, from the folder REAL_LORA_DIR or ../shared/real; without it the test skips."""
    folder = Path(os.environ.get("REAL_LORA_DIR") or ROOT.parent / "shared" / "real")

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"the real file {name} is absent: set REAL_LORA_DIR to the folder that has it")
        return folder / name

    return find


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a regular, not editable, pip install of this project and none of its dependencies."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("lora_compress", "networks", "library"):  # a copy: setuptools leaves build/ and egg-info where it builds
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "LICENSE", "README.md", *(file.name for file in ROOT.glob("*_ext.py"))):
        if (ROOT / file).is_file():
            shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-compile", "--quiet"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def torchvision_repair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that lets torchvision import in processes that load sd-scripts before anything of ours.

    Needed where PyPI's torchvision sits beside a CPU-only torch: sd-scripts alone does not start there. Elsewhere it does nothing.
    """
    folder = tmp_path_factory.mktemp("torchvision_repair")
    shim = ROOT / "library" / "compress_torchvision.py"
    code = f"import runpy\nrunpy.run_path({str(shim)!r})['declare_missing_operators']()\n"
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    return folder


def _checkout_of(version: str) -> Path | None:
    main = find_sd_scripts()
    folders = [*([main] if main else []), ROOT / ".sd-scripts-versions" / version]
    return next((folder for folder in folders if is_checkout(folder) and sd_scripts_version(folder) == version), None)


def _absent(reason: str) -> NoReturn:
    if os.environ.get("REQUIRE_SD_SCRIPTS") == "1":
        pytest.fail(f"{reason} (REQUIRE_SD_SCRIPTS=1)", pytrace=False)
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves the tests that are marked `thorough`, and those of older sd-scripts, to `bootstrap.py test --all`."""
    if os.environ.get("LORA_COMPRESS_TEST_ALL") == "1":
        return
    for item in items:
        if item.get_closest_marker("thorough") or (_is_of_an_older_host(item) and not item.get_closest_marker("smoke")):
            item.add_marker(pytest.mark.skip(reason=f"{_THOROUGH} runs it"))


def _is_of_an_older_host(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("sd_scripts_at", PINNED) != PINNED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Writes into the report of a test against which versions of sd-scripts it ran; a process of pytest-xdist sends it on."""
    report: pytest.TestReport = yield  # type: ignore[misc]
    if report.when == "call" and not report.skipped:
        report.user_properties.append((_VERSIONS, sorted(_versions_under_test(item))))
    return report  # type: ignore[return-value]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts the tests that ran against sd-scripts, and notes why a test was skipped."""
    _ran.update(version for name, versions in report.user_properties if name == _VERSIONS for version in versions)
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Notes why a whole file was skipped."""
    _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        told = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skips.append(told.removeprefix("Skipped: "))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run for a skip that is not on the list, where the list is binding."""
    if (
        not _is_worker(session.config)
        and is_required()
        and session.exitstatus == pytest.ExitCode.OK
        and not all(map(is_allowed, _skips))
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists what was skipped and why."""
    if _skips:
        terminalreporter.section("skipped tests, by reason")
        for line in summary(_skips):
            terminalreporter.write_line(line)


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is one of several processes that pytest-xdist has started: the one that started them tells the end."""
    return hasattr(config, "workerinput")


def _versions_under_test(item: pytest.Item) -> set[str]:
    versions = set()
    if "sd_scripts_at" in getattr(item, "fixturenames", ()):
        versions.add(item.callspec.params["sd_scripts_at"])  # type: ignore[attr-defined]
    root = find_sd_scripts() if "sd_scripts" in getattr(item, "fixturenames", ()) else None
    return versions | ({sd_scripts_version(root)} if root else set())


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Says after pytest's own last line what that line does not: how much of the above met the real sd-scripts."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or _is_worker(config) or config.option.collectonly or config.option.help:
        return
    most_first = sorted(_ran.items(), key=lambda item: item[1], reverse=True)
    against = ", ".join(f"{count} against {version}" for version, count in most_first)
    absent = sum(reason.startswith(_ABSENT) for reason in _skips)
    reporter.write_line(f"sd-scripts: tests run: {against or 'none'}; {absent} skipped for want of it")
