"""Sets the project up and runs it: `python bootstrap.py demo`, `python bootstrap.py test`. Needs Python >= 3.10 and nothing else.

Makes .venv, installs the pinned requirements, obtains sd-scripts and starts the work; a second run finds all that there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from networks.sd_scripts_lookup import COMMITS, PINNED, URL, find_sd_scripts, is_checkout, remedy, sd_scripts_version

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VERSIONS = ROOT / ".sd-scripts-versions"  # further sd-scripts that the tests run against
REQUIREMENTS = {"demo": ROOT / "requirements" / "run.txt", "test": ROOT / "requirements" / "dev.txt"}
OVERLAYS = {  # what some tests put before the environment: requirements that are at odds with its pins, and the folder they go to
    **{ROOT / "requirements" / f"diffusers-{minor}.txt": ROOT / f".diffusers-{minor}" for minor in ("0.35", "0.38", "0.42")},
    ROOT / "requirements" / "gui.txt": ROOT / ".gui",
}
if sys.platform == "linux":  # elsewhere torchao has no wheel for every machine
    OVERLAYS[ROOT / "requirements" / "torchao.txt"] = ROOT / ".torchao"
ALWAYS = (".gui",)  # the overlays that every run of the tests needs; the others are for --all
MINIMUM_PYTHON = (3, 10)
OVERLAY_PYTHON = (3, 11)  # before it their pins cannot be installed, and the tests that need them are skipped
PROBE_SECONDS = 20  # for the git server's first answer
CLONE_SECONDS = 900
EVERYTHING = {"LORA_COMPRESS_TEST_ALL": "1", "LORA_COMPRESS_FUZZ": "10000", "LORA_COMPRESS_EXAMPLES": "300"}  # what --all sets
MOST_PROCESSES = 8  # of the tests: some of them need 2 GB
CHECKS = (
    ("ruff check", ["-m", "ruff", "check", "."]),
    ("ruff format", ["-m", "ruff", "format", "--check", "."]),
    ("mypy", ["-m", "mypy"]),
)


class BootstrapError(Exception):
    """What went wrong and what to do about it, in one line."""


class SourceError(BootstrapError):
    """sd-scripts cannot be obtained."""


def main(arguments: list[str] | None = None) -> int:
    """Prepares what the verb needs, does its work, and returns the exit code: non-zero if anything failed."""
    options, passed_on = _parse(arguments)
    try:
        if sys.version_info < MINIMUM_PYTHON:
            raise BootstrapError(
                f"Python {sys.version.split()[0]} is too old: run this with Python {MINIMUM_PYTHON[0]}.{MINIMUM_PYTHON[1]} or newer"
            )
        root = _sd_scripts_for(options.verb)
        requirements = REQUIREMENTS[options.verb]
        python = Path(sys.executable) if options.python_env == "current" else make_environment(VENV)
        if options.python_env == "current":
            check_installed(requirements)
        else:
            install(requirements, python, VENV / "requirements.stamp")
            for wanted, folder in _overlays(options).items():
                overlay = ["--no-deps", "--upgrade", "--target", str(folder)]
                install(wanted, python, folder / "requirements.stamp", overlay)
        environment = _environment(python, root)
        if options.verb == "demo":
            return _run_demo(python, passed_on, environment)
        return _run_tests(python, passed_on, (EVERYTHING if options.all else {}) | environment)
    except BootstrapError as error:
        print(f"bootstrap: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="bootstrap.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "verb", choices=sorted(REQUIREMENTS), help="demo: train, compress and draw on the tiny model; test: every check"
    )
    parser.add_argument(
        "--python-env",
        choices=["venv", "current"],
        default="venv",
        help="venv (default): make .venv and install into it; current: use the running Python and install nothing",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="of test: also on other releases of diffusers, PEFT, torchao and sd-scripts, with everything that takes minutes",
    )
    parser.epilog = "Further arguments go to tools/demo.py or to pytest."
    options, passed_on = parser.parse_known_args(arguments)
    return options, [argument for argument in passed_on if argument != "--"]


def _overlays(options: argparse.Namespace) -> dict[Path, Path]:
    """Return the requirements that the tests need beside the environment, each with its folder."""
    if options.verb != "test" or sys.version_info < OVERLAY_PYTHON:
        return {}
    return {wanted: folder for wanted, folder in OVERLAYS.items() if options.all or folder.name in ALWAYS}


def _say(text: str) -> None:
    print(f"bootstrap: {text}", flush=True)


# ---- the Python environment


def make_environment(folder: Path) -> Path:
    """Makes a virtual environment in `folder`, unless a working one is there, and returns its interpreter."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    check = f"import pip, sys; sys.exit(sys.version_info < {MINIMUM_PYTHON})"
    if python.exists() and subprocess.run([python, "-c", check], capture_output=True).returncode == 0:
        return python
    _say(f"making {folder}")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], capture_output=True, text=True)
    if made.returncode != 0:
        output = made.stdout + made.stderr
        if "ensurepip" in output or "No module named venv" in output:
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise BootstrapError(
                f"this Python has no venv module: install it (Debian, Ubuntu: apt install python{version}-venv) and run again"
            )
        raise BootstrapError(
            f"{folder} could not be made: {output.strip().splitlines()[-1] if output.strip() else 'python -m venv failed'}"
        )
    return python


def install(requirements: Path, python: Path, stamp: Path, options: list[str] | None = None) -> bool:
    """Installs a requirements file and those it includes, unless `stamp` says that just these are installed; True if it did."""
    wanted = {f"{file.name} {fingerprint(file)}" for file in included(requirements)}
    present = set(stamp.read_text(encoding="utf-8").splitlines()) if stamp.is_file() else set()
    if wanted <= present:
        return False
    _say(f"installing {requirements.parent.name}/{requirements.name}")
    stamp.unlink(missing_ok=True)
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        *(options or ()),
        "-r",
        str(requirements),
    ]
    if subprocess.call(command) != 0:
        raise BootstrapError(
            "pip failed, its message is above: mend what it names (network, proxy, disk space), then run this again"
        )
    stamp.write_text("\n".join(sorted(wanted)) + "\n", encoding="utf-8")
    return True


def included(requirements: Path) -> Iterator[Path]:
    """The requirements file itself and the ones that it includes by `-r`."""
    yield requirements
    for name in re.findall(r"^-r\s+(\S+)", requirements.read_text(encoding="utf-8"), flags=re.MULTILINE):
        yield from included(requirements.parent / name)


def fingerprint(requirements: Path) -> str:
    """A hash of the content of a requirements file and of all that it refers to by `-r` and `-c`."""
    text = requirements.read_text(encoding="utf-8")
    parts = [text, *(fingerprint(requirements.parent / name) for name in re.findall(r"^-[rc]\s+(\S+)", text, flags=re.MULTILINE))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def check_installed(requirements: Path) -> None:
    """Raises BootstrapError with the command to run if the running Python lacks a distribution that a requirements file names."""
    missing = []
    for file in included(requirements):
        lines = re.findall(
            r'^([A-Za-z][\w.-]*)(?:; sys_platform == "(\w+)")?', file.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        for name in (name for name, system in lines if system in ("", sys.platform)):
            alike = [name, name.removesuffix("-headless"), name.replace("-headless", "-contrib")] if "opencv" in name else [name]
            if not any(_is_installed(candidate) for candidate in alike):
                missing.append(name)
    if missing:
        constraints = REQUIREMENTS["demo"].with_name("constraints.txt")
        command = f'"{sys.executable}" -m pip install -c "{constraints}" {" ".join(missing)}'
        raise BootstrapError(f"this Python lacks {len(missing)} packages (leave out -c to keep your own versions): {command}")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# ---- sd-scripts


def _sd_scripts_for(verb: str) -> Path | None:
    """sd-scripts for this verb: without it the demo trains with diffusers, and the tests that need it are skipped and say why."""
    try:
        root = obtain_sd_scripts()
        _say(f"sd-scripts {sd_scripts_version(root)} in {root}")
        if verb == "test":
            for version in COMMITS:
                if version != sd_scripts_version(root) and not is_checkout(VERSIONS / version):
                    clone(COMMITS[version], VERSIONS / version)
        return root
    except SourceError as error:
        without = "Tests that need it are skipped" if verb == "test" else "The demo trains with diffusers instead"
        _say(f"{error}. {without}.")
        return find_sd_scripts()


def obtain_sd_scripts() -> Path:
    """The sd-scripts that `find_sd_scripts` finds, or else a new clone of the pinned version in sd-scripts/.

    Raises:
        SourceError: there is none and it cannot be cloned.
        BootstrapError: SD_SCRIPTS_DIR is set and is not a checkout.
    """
    try:
        root = find_sd_scripts()
    except ModuleNotFoundError as error:
        raise BootstrapError(str(error)) from None
    if root is None:
        root = ROOT / "sd-scripts"
        _say(f"getting sd-scripts {PINNED}")
        clone(COMMITS[PINNED], root)
    return root


def clone(commit: str, target: Path, url: str = URL) -> None:
    """Makes a clone of root files, library/, networks/ and tools/ at `commit`; `target` appears complete or not at all.

    gen_img.py imports from tools/. What an interrupted run left under the temporary name is replaced; a `target` that is no
    checkout is moved aside.
    """
    partial = target.with_name(target.name + ".partial")
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    _git(["ls-remote", "--exit-code", url, "HEAD"], PROBE_SECONDS)  # a dead network is known at once, not when TCP gives up
    _git(["clone", "--quiet", "--filter=blob:none", "--no-checkout", url, str(partial)], CLONE_SECONDS)
    _git(["-C", str(partial), "sparse-checkout", "init", "--cone"], CLONE_SECONDS)
    _git(["-C", str(partial), "sparse-checkout", "set", "library", "networks", "tools"], CLONE_SECONDS)
    _git(["-C", str(partial), "checkout", "--quiet", "--detach", commit], CLONE_SECONDS)
    if not is_checkout(partial):
        raise SourceError(f"{url} at {commit[:7]} holds no sd-scripts: {remedy()}")
    if target.exists():
        names = (target.with_name(f"{target.name}.incomplete-{number}") for number in range(1, 1000))
        aside = next(name for name in names if not name.exists())
        _say(f"{target} is not a checkout of sd-scripts; moved to {aside.name}")
        target.rename(aside)
    partial.rename(target)


def _git(arguments: list[str], seconds: int) -> None:
    # A git that was started by a hook would otherwise act on the repository of the hook.
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1", "LC_ALL": "C"}
    stalled = ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=30"]
    try:
        done = subprocess.run(
            ["git", *stalled, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except FileNotFoundError:
        raise SourceError(f"sd-scripts cannot be had without git: install git, or {remedy()}") from None
    except subprocess.TimeoutExpired:
        raise SourceError(f"sd-scripts cannot be had, the server did not answer within {seconds} s: {remedy()}") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["git failed"]
        reason = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[-1])
        raise SourceError(f"sd-scripts cannot be had ({reason}): {remedy()}")


def _remove(folder: Path) -> None:
    for path in folder.rglob("*") if os.name == "nt" else ():  # git writes its objects read-only, and Windows then keeps them
        path.chmod(stat.S_IWRITE | stat.S_IREAD)
    if folder.exists():
        shutil.rmtree(folder)


# ---- the work


def _environment(python: Path, root: Path | None) -> dict[str, str]:
    """The environment of what is started: the interpreter's own programs first, UTF-8, and sd-scripts where it was found."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    environment["PATH"] = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    environment |= {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stand still on a busy machine
    if VENV in python.parents:
        environment["VIRTUAL_ENV"] = str(VENV)
    if root is not None:
        environment["SD_SCRIPTS_DIR"] = str(root)
    return environment


def _run_demo(python: Path, arguments: list[str], environment: dict[str, str]) -> int:
    return subprocess.call([python, ROOT / "tools" / "demo.py", *arguments], env=environment)


def _run_tests(python: Path, arguments: list[str], environment: dict[str, str]) -> int:
    """Runs every check even if an earlier one fails; pytest comes last, so that its summary ends the output."""
    failed = []
    cores = min(os.cpu_count() or 1, MOST_PROCESSES)
    spread = ["-n", str(cores), "--dist", "worksteal"] if cores > 1 else []  # neighbours stay together, as their fixtures ask for
    environment = {"OMP_NUM_THREADS": "1"} | environment if spread else environment
    for name, command in (*CHECKS, ("pytest", ["-m", "pytest", *spread, *arguments])):
        _say(name)
        if subprocess.call([python, *command], cwd=ROOT, env=environment) != 0:
            failed.append(name)
    if failed:
        _say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
