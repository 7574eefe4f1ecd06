"""Plain files, load_lora and training on further releases of diffusers, transformers, PEFT and torchao.

`python bootstrap.py test --all` puts each beside the pinned ones, in a folder of its own. The tests themselves stand in the other
files here; what this one adds is the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from consumers.conftest import absent

ROOT = Path(__file__).resolve().parents[2]
LOADERS = ("tests/consumers/test_diffusers.py", "tests/consumers/test_matrix.py", "tests/consumers/test_diffusers_families.py")
TRAINING = ("tests/consumers/test_diffusers_training.py",)
BASES = ("tests/consumers/test_quantized_bases.py",)
CONVERTERS = (LOADERS[1:], "get_to_every_layer or naive or (kohya and sd)")  # only what depends on diffusers' own
RUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {  # overlays, files, and which tests of them
    "0.35": (("diffusers-0.35",), *CONVERTERS),
    "0.38": (("diffusers-0.38",), *CONVERTERS),
    "0.42": (("diffusers-0.42",), LOADERS, "layer or swapped or weighed or flux or naive"),  # with newer transformers and PEFT
    "0.42_training": (("diffusers-0.42",), TRAINING, "not torchao"),
    "0.42_torchao": (("torchao", "diffusers-0.42"), TRAINING + BASES, "torchao or gguf"),
    "torchao": (("torchao",), TRAINING, "torchao"),  # that the pinned PEFT does not fit
}
VERSIONS = {
    "diffusers-0.35": {"diffusers": "0.35.2"},
    "diffusers-0.38": {"diffusers": "0.38.0"},
    "diffusers-0.42": {"diffusers": "0.42.1", "transformers": "5.24.0", "peft": "0.21.2"},
    "torchao": {"torchao": "0.18.0"},
}


@pytest.mark.thorough
@pytest.mark.parametrize("run", RUNS)
def test_the_tests_pass_on_other_releases(run: str) -> None:
    overlays, files, chosen = RUNS[run]
    folders = {name: Path(os.environ.get("DIFFUSERS_OVERLAYS") or ROOT) / f".{name}" for name in overlays}
    for name, folder in folders.items():
        if not folder.is_dir():
            absent(f"pip install --no-deps --target {folder} -r requirements/{name}.txt has not been run")
    path = os.pathsep.join([*map(str, folders.values()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "REQUIRE_LISTED_SKIPS": "1"}
    expected = {package: version for name in overlays for package, version in VERSIONS[name].items()}
    told = f"from importlib.metadata import version; assert {{name: version(name) for name in {list(expected)}}} == {expected}"
    subprocess.run([sys.executable, "-c", told], env=environment, check=True, timeout=120)
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
