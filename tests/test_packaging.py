"""The wheel holds every module that is ours and nothing else."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_ships_every_module(installed: Path) -> None:
    folders = {name: ROOT / name for name in ("lora_compress", "networks", "library")}
    ours = {file.relative_to(ROOT) for folder in folders.values() for file in folder.rglob("*.py")}
    ours |= {file.relative_to(ROOT) for file in ROOT.glob("*_ext.py")}
    shipped = {file.relative_to(installed) for file in installed.rglob("*.py")}
    assert shipped == ours


def test_host_packages_stay_namespaces(installed: Path) -> None:
    """An __init__.py in either would hide sd-scripts' folder of the same name."""
    assert not list(installed.glob("networks/__init__.py")) + list(installed.glob("library/__init__.py"))


def test_metadata_names_the_licence_and_few_dependencies(installed: Path) -> None:
    folder = next(installed.glob("lora_compress-*.dist-info"))
    metadata = (folder / "METADATA").read_text(encoding="utf-8")
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert {line.split()[1].split(">")[0].split("<")[0] for line in needed} == {
        "torch",
        "safetensors",
        "numpy",
        "tqdm",
        "rich",
        "threadpoolctl",
        "constriction",
        "vl-convert-python",
    }
    assert "Apache License" in next(folder.rglob("LICENSE")).read_text(encoding="utf-8")
