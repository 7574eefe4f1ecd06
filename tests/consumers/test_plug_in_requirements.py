"""Each plug-in as its users install it: the built folder and an environment without the rest of what this project requires."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest
from consumers.bare import bare_python, required
from consumers.conftest import absent
from consumers.test_held import builder, packed
from packaging.requirements import Requirement

EVERY_HOST = [Requirement(name) for name in ("torch", "numpy", "safetensors")]  # what each of the programs has
LISTS = {  # the variable that names a checkout of a program: its own list of requirements, the plug-in for it
    "COMFYUI_DIR": ("requirements.txt", "comfyui"),
    "A1111_DIR": ("requirements_versions.txt", "a1111"),
    "FORGE_DIR": ("requirements_versions.txt", "a1111"),
    "FORGE_NEO_DIR": ("requirements.txt", "a1111"),
}
WORK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
for name in sys.argv[4:]:
    __import__(name)
core = sys.argv[3]
def ours(name):
    return __import__(f"{core}.{name}", fromlist=["x"])
source, made = Path(sys.argv[2]), Path(sys.argv[2]).parent
CompressionSettings = ours("settings").CompressionSettings
for number, values in enumerate(({"bits": 4, "strategy": "entropy"}, {"bits": 4, "strategy": "nf4"}, {"rank_ratio": 0.5})):
    report = ours("engine.to_file").compress_file(source, made / f"{number}.safetensors", CompressionSettings.parse(values))
    assert report.notes is not None
    assert ours("inspection.file").inspect_file(made / f"{number}.safetensors").modules
from safetensors.torch import load_file
for module in ours("packed.in_memory").packed_layers(load_file(made / "0.safetensors")).values():
    assert module.decode().up.isfinite().all()
import importlib.util
print(*(name for name in ("rich", "tqdm", "vl_convert", "numba") if importlib.util.find_spec(name)))
"""


def imported(package: Path) -> list[str]:
    """The modules of the core that the files of a built plug-in import."""
    found = set()
    for file in package.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(builder().VENDORED):
                found.add(str(node.module))
    assert found
    return sorted(found)


@pytest.mark.parametrize(("name", "package"), [("comfyui", ""), ("a1111", "lora_compress_webui")])
def test_the_core_of_a_plug_in_works_with_what_every_host_has_and_its_own_requirements(
    name: str, package: str, tmp_path: Path
) -> None:
    """torch, numpy and safetensors, and nothing that this project's other commands import."""
    folder = builder().build(name, tmp_path / "built")
    packed(tmp_path, bits=4)  # leaves in.safetensors there
    python = bare_python(tmp_path / "bare", EVERY_HOST, required(folder / "requirements.txt"))
    arguments = [folder / package, tmp_path / "in.safetensors", builder().VENDORED, *imported(folder / package)]
    done = subprocess.run([python, "-I", "-c", WORK, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == []  # the environment is as bare as it is meant to be


@pytest.mark.parametrize("variable", LISTS)
def test_each_host_requires_what_the_plug_in_takes_for_granted(variable: str) -> None:
    if not os.environ.get(variable):
        absent(f"set {variable} to a checkout of the program")
    listed = {requirement.name.lower() for requirement in required(Path(os.environ[variable]) / LISTS[variable][0])}
    assert listed >= {requirement.name for requirement in EVERY_HOST}


def test_the_extension_asks_its_host_for_every_requirement(tmp_path: Path) -> None:
    """install.py with a `launch` that has nothing installed and writes down what it is asked for."""
    folder = builder().build("a1111", tmp_path / "built")
    (tmp_path / "launch.py").write_text(
        "def is_installed(package):\n    return package == 'threadpoolctl'\ndef run_pip(command, desc=None):\n    print(command)\n"
    )
    python = bare_python(tmp_path / "bare", [], [])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([python, folder / "install.py"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    wanted = [line for line in (folder / "requirements.txt").read_text().split() if not line.startswith("threadpoolctl")]
    assert done.stdout.splitlines() == [f'install "{line}"' for line in wanted] and wanted
