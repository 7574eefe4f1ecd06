"""The operators are declared where torchvision fails for want of them, and nowhere else; each case in a fresh process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DECLARE = "from library.compress_torchvision import declare_missing_operators; declared = declare_missing_operators()\n"
USE = """
import torch, torchvision
from torchvision import transforms
flipped = transforms.functional.hflip(torch.arange(3.0).view(1, 1, 3))
assert flipped.flatten().tolist() == [2, 1, 0]
"""


def _run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(folder) for folder in (*path, ROOT))}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)


def test_torchvision_imports_and_is_repaired_only_if_it_would_not() -> None:
    """True of every pair of torch and torchvision: what this machine has decides which half is exercised."""
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    broken = _run("import torchvision").returncode != 0
    repaired = _run(f"{DECLARE}{USE}print(declared)")
    assert repaired.returncode == 0, repaired.stderr
    assert repaired.stdout.split() == [str(broken)]


def test_calling_a_declared_operator_says_that_it_has_no_kernel() -> None:
    code = f"{DECLARE}{USE}print(declared)\ntorch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"
    done = _run(code)
    if done.stdout.split() == ["False"]:
        pytest.skip("this torchvision has its operators")
    assert done.returncode != 0
    assert "Could not run 'torchvision::nms'" in done.stderr or "NotImplementedError" in done.stderr


def test_after_a_regular_import_nothing_is_declared_again() -> None:
    done = _run(f"{DECLARE}import torchvision\n{DECLARE}print(declared)")
    assert done.stdout.split() == ["False"], done.stderr


def test_without_torchvision_not_even_torch_is_imported() -> None:
    blocked = (
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'torchvision' else find(name, package)\n"
    )
    done = _run(f"{blocked}{DECLARE}import sys; print(declared, 'torch' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_damaged_extension_is_left_for_torchvision_to_report(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    shutil.copy(package / f"_C{EXTENSION_SUFFIXES[0]}", package / f"_C{EXTENSION_SUFFIXES[-1]}")
    done = _run(f"{DECLARE}import torch; print(declared, hasattr(torch.ops.torchvision, 'nms'))", tmp_path)
    assert done.stdout.split() == ["False", "False"], done.stderr
