"""run: a script of someone else's reads packed files as expanded ones, and nothing else about it changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core.factories import mixed_updates
from safetensors.torch import load_file, save_file

from lora_compress import CompressionSettings, as_kohya
from lora_compress.cli import main
from lora_compress.engine.in_memory import compress, save

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, sys
from safetensors.torch import load_file, save_file
import neighbour
if __name__ == "__main__":
    save_file({key: tensor.contiguous() for key, tensor in load_file(sys.argv[1], device="cpu").items()}, sys.argv[2])
    print(json.dumps([sys.argv, neighbour.HERE]))
    sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "library"  # the name of a package of ours
    folder.mkdir()
    (folder / "neighbour.py").write_text("HERE = 'beside the script'\n", encoding="utf-8")
    (folder / "copy.py.txt").write_text(SCRIPT, encoding="utf-8")
    return folder / "copy.py.txt"


def _run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "resize_lora_ext.py"), "run", *map(str, words)], capture_output=True, text=True, cwd=ROOT.parent
    )


def test_a_script_reads_what_expand_writes(script: Path, tmp_path: Path) -> None:
    packed, expanded, plain = (tmp_path / f"{name}.safetensors" for name in ("packed", "expanded", "plain"))
    save(compress(mixed_updates(rank=6), CompressionSettings.parse({"bits": 4, "save_format": "packed"})), packed)
    save_file(as_kohya(mixed_updates(rank=6)), plain)
    assert main(["expand", "--model", str(packed), "--save_to", str(expanded)]) == 0
    for given, wanted, status in ((packed, expanded, 3), (plain, plain, 0)):
        target = tmp_path / "out.safetensors"
        done = _run(script, given, target, status)
        assert done.returncode == status, done.stderr
        assert json.loads(done.stdout) == [[str(script), str(given), str(target), str(status)], "beside the script"]
        read, reference = load_file(target), load_file(wanted)
        assert read.keys() == reference.keys()
        assert all(torch.equal(tensor, reference[key]) and tensor.dtype == reference[key].dtype for key, tensor in read.items())


def test_damage_is_one_line_and_what_the_script_raises_is_its_own(script: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    save(compress(mixed_updates(rank=6), CompressionSettings.parse({"bits": 4, "save_format": "packed"})), packed)
    data = bytearray(packed.read_bytes())
    data[-1] ^= 1
    packed.write_bytes(data)
    done = _run(script, packed, tmp_path / "out.safetensors", 0)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "packed.safetensors" in done.stderr
    packed.write_bytes(data[: -len(data) // 3])
    done = _run(script, packed, tmp_path / "out.safetensors", 0)
    assert done.returncode == 1 and "modules are missing" in done.stderr and len(done.stderr.splitlines()) == 1
    done = _run(script, tmp_path / "none.safetensors", tmp_path / "out.safetensors", 0)
    assert done.returncode == 1 and "FileNotFoundError" in done.stderr
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("words", [[], ["--models", "a"], ["none.py"]])
def test_wrong_usage_says_what_comes_first(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words]) == 2
    assert capsys.readouterr().err.startswith("error: run")
    assert main(["run", "--help"]) == 0 and "SCRIPT" in capsys.readouterr().out
