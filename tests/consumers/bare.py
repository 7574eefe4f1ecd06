"""A virtual environment with the packages that a program requires and those of our plug-in, and with nothing else.

What is installed here is linked into it, so that it takes no download and a second; a package that nobody required is as absent as
on a user's machine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

__all__ = ["bare_python", "required"]


def required(file: Path) -> list[Requirement]:
    """The requirements that a file lists, options of pip and comments apart."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def bare_python(folder: Path, host: Iterable[Requirement], plug_in: Iterable[Requirement]) -> Path:
    """The interpreter of a new environment in `folder`.

    Args:
        host: what the program requires; packages that are not installed here are left out, which makes the environment barer.
        plug_in: what our plug-in adds; each must be installed here in a version that it allows.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    told = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
    )
    packages = Path(told.stdout.strip())
    for requirement in plug_in:
        found = distribution(requirement.name).version
        assert requirement.specifier.contains(found), f"{requirement} is required and {found} is installed"
    for entry, target in sorted(_entries(_closure([*host, *plug_in])).items()):
        (packages / entry).symlink_to(target, target_is_directory=target.is_dir())
    return python


def _closure(requirements: Iterable[Requirement]) -> list[Distribution]:
    """The installed distributions that are required, directly or by one another."""
    found: dict[str, Distribution] = {}
    queue = list(requirements)
    while queue:
        requirement = queue.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in found or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        queue += [Requirement(text) for text in found[name].requires or ()]
    return list(found.values())


def _entries(distributions: Iterable[Distribution]) -> dict[str, Path]:
    """{name in site-packages: its file or folder here}."""
    found = {}
    for each in distributions:
        for file in each.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__"):
                found[top] = Path(str(each.locate_file(top)))
    return found
