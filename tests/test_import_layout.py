"""Our modules and those of the real sd-scripts import side by side however the two are laid out; each layout in a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALL_VERSIONS = ["v0.11.1", "v0.10.1", "v0.9.1"]

# Both projects' modules, ours first as a user's command line would name them. Prints where each one came from.
IMPORTS = """
import importlib, json, sys
names = sys.argv[1].split(",")
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""


def _our_modules() -> list[str]:
    """Every module of ours in networks/, the join first, and those in library/ that are free of a trainer's class."""
    networks = sorted(f"networks.{file.stem}" for file in (ROOT / "networks").glob("*.py"))
    return [*sorted(networks, key=lambda name: name != "networks.sd_scripts_path"), "library.compress_torchvision"]


def _import_all(cwd: Path, names: list[str], **environment: str) -> dict[str, Path]:
    """Imports the modules in a fresh process started in `cwd` and returns the file of each."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SD_SCRIPTS_DIR")}
    command = [sys.executable, "-c", IMPORTS, ",".join(names)]
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: Path(file).resolve() for name, file in json.loads(done.stdout.splitlines()[-1]).items()}


def _assert_joined(found: dict[str, Path], ours: Path, theirs: Path) -> None:
    for name, file in found.items():
        home = theirs if name in ("library.train_util", "networks.lora", "train_network") else ours
        assert file == home.resolve() / Path(*name.split(".")).with_suffix(".py"), name


@pytest.mark.parametrize("sd_scripts_at", ALL_VERSIONS, indirect=True)
def test_from_our_repository(sd_scripts_at: Path) -> None:
    names = [*_our_modules(), "library.train_util", "networks.lora"]
    _assert_joined(_import_all(ROOT, names, SD_SCRIPTS_DIR=str(sd_scripts_at)), ours=ROOT, theirs=sd_scripts_at)


@pytest.mark.parametrize("sd_scripts_at", ALL_VERSIONS, indirect=True)
def test_from_sd_scripts_with_ours_installed(sd_scripts_at: Path, installed: Path, torchvision_repair: Path) -> None:
    """sd-scripts' trainer is loaded first, as by `python train_network.py --network_module networks.lora_compress`."""
    names = ["train_network", "networks.lora", *_our_modules(), "library.train_util"]
    path = os.pathsep.join([str(torchvision_repair), str(installed)])
    _assert_joined(_import_all(sd_scripts_at, names, PYTHONPATH=path), ours=installed, theirs=sd_scripts_at)


@pytest.mark.parametrize("sd_scripts_at", ALL_VERSIONS, indirect=True)
def test_our_files_copied_into_sd_scripts(sd_scripts_at: Path, tmp_path: Path) -> None:
    names = [*_our_modules(), "library.train_util", "networks.lora", "train_network"]
    taken = [file for file in _shipped_into_host() if (sd_scripts_at / file).exists()]
    assert not taken, "sd-scripts has files of these names"
    shutil.copytree(sd_scripts_at, tmp_path, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    shutil.copytree(ROOT / "lora_compress", tmp_path / "lora_compress")
    for file in _shipped_into_host():
        shutil.copy(ROOT / file, tmp_path / file)
    _assert_joined(_import_all(tmp_path, names), ours=tmp_path, theirs=tmp_path)


def _shipped_into_host() -> list[Path]:
    files = [*(ROOT / "networks").glob("*.py"), *(ROOT / "library").glob("*.py"), *ROOT.glob("*_ext.py")]
    return [file.relative_to(ROOT) for file in files]


@pytest.mark.parametrize("sd_scripts_at", ["v0.11.1"], indirect=True)
def test_the_chosen_checkout_wins_over_one_on_the_path(sd_scripts_at: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(sd_scripts_at, other, ignore=shutil.ignore_patterns(".git"))
    names = ["networks.sd_scripts_path", "library.train_util", "networks.lora"]
    found = _import_all(ROOT, names, SD_SCRIPTS_DIR=str(sd_scripts_at), PYTHONPATH=str(other))
    _assert_joined(found, ours=ROOT, theirs=sd_scripts_at)


@pytest.mark.parametrize("sd_scripts_at", ["v0.11.1"], indirect=True)
def test_what_was_imported_before_the_join_stays_reachable(sd_scripts_at: Path) -> None:
    """A test or tool may import one of our library modules first; the package it then made must give way to sd-scripts' own."""
    code = (
        "import library.compress_torchvision as early; import networks.sd_scripts_path, library.train_util; "
        "assert library.compress_torchvision is early"
    )
    done = _run(code, ROOT, SD_SCRIPTS_DIR=str(sd_scripts_at))
    assert done.returncode == 0, done.stderr


def test_without_sd_scripts_the_error_says_what_to_set(installed: Path, tmp_path: Path) -> None:
    done = _run("import networks.sd_scripts_path", tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 1
    assert "ModuleNotFoundError: sd-scripts is not to be found: set SD_SCRIPTS_DIR" in done.stderr


@pytest.mark.parametrize("sd_scripts_at", ["v0.11.1"], indirect=True)
def test_a_foreign_package_called_library_is_named(sd_scripts_at: Path, tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "__init__.py").touch()
    done = _run("import networks.sd_scripts_path", ROOT, SD_SCRIPTS_DIR=str(sd_scripts_at), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert f"the package `library` at {tmp_path / 'library'} hides the one of sd-scripts" in done.stderr


def test_the_core_needs_neither_sd_scripts_nor_a_trainer(installed: Path, tmp_path: Path) -> None:
    """In a folder of its own, where importing any host package is an error."""
    code = (
        "import sys\n"
        "for host in ('library', 'networks', 'accelerate', 'diffusers', 'transformers', 'torchvision', 'cv2', 'toml'):\n"
        "    sys.modules[host] = None\n"
        "import lora_compress; print(lora_compress.__file__)"
    )
    done = _run(code, tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed)


def _run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SD_SCRIPTS_DIR")}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=kept | environment, capture_output=True, text=True)
