"""Packed files that another program has read, and the folder that is built for it: no host is needed to test these."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from core.factories import mixed_updates
from safetensors.torch import load_file, save_file

from lora_compress import CompressionSettings, FormatError, as_kohya, compress_file, load_lora
from lora_compress.packed.file import INDEX_KEY, PAYLOAD_KEY
from lora_compress.packed.in_memory import cut_tensors, packed_modules

ROOT = Path(__file__).resolve().parents[2]


def packed(folder: Path, **settings: object) -> Path:
    tensors = {key: tensor.contiguous() for key, tensor in as_kohya(mixed_updates()).items()}
    save_file(tensors, folder / "in.safetensors")
    compress_file(folder / "in.safetensors", folder / "packed.safetensors", CompressionSettings.parse(settings))
    return folder / "packed.safetensors"


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 4, "strategy": "entropy", "progressive": True}], ids=str)
def test_modules_decode_to_what_the_file_holds(settings: dict[str, object], tmp_path: Path) -> None:
    path = packed(tmp_path, **settings)
    held, expected = packed_modules(load_file(path)), load_lora(path).updates
    assert held.keys() == expected.keys()
    for name, update in expected.items():
        found = held[name].decode()
        assert torch.equal(found.down, update.down) and torch.equal(found.up, update.up) and found.alpha == update.alpha


def test_a_beginning_is_the_smaller_lora_of_the_cut_file(tmp_path: Path) -> None:
    tensors = load_file(packed(tmp_path, bits=6, strategy="entropy", progressive=True))
    size = len(tensors[PAYLOAD_KEY])
    part = cut_tensors(tensors, size // 2)
    assert len(part[PAYLOAD_KEY]) <= size // 2
    whole, less = packed_modules(tensors), packed_modules(part)
    assert whole.keys() == less.keys()
    count = {name: (len(less[name].modules.chunks(name)), len(whole[name].modules.chunks(name))) for name in whole}
    assert any(part < every for part, every in count.values())
    with pytest.raises(FormatError, match=r"lack \d of 4 modules: take a larger size"):
        cut_tensors(tensors, 1)


def test_what_another_program_broke_is_refused(tmp_path: Path) -> None:
    tensors = load_file(packed(tmp_path, bits=4))
    with pytest.raises(FormatError, match="it is no packed LoRA"):
        packed_modules({PAYLOAD_KEY: tensors[PAYLOAD_KEY]})
    with pytest.raises(FormatError, match=r"is torch\.float16 .*another program has changed it"):
        packed_modules(tensors | {PAYLOAD_KEY: tensors[PAYLOAD_KEY].half()})
    with pytest.raises(FormatError, match="the index speaks of"):
        packed_modules(tensors | {PAYLOAD_KEY: tensors[PAYLOAD_KEY][:-1]})
    with pytest.raises(FormatError, match="its index cannot be read"):
        packed_modules(tensors | {INDEX_KEY: tensors[INDEX_KEY][:-1]})
    damaged = tensors[PAYLOAD_KEY].clone()
    damaged[0] ^= 1
    name, module = next(iter(packed_modules(tensors | {PAYLOAD_KEY: damaged}).items()))
    with pytest.raises(FormatError, match=f"{name}: its bytes do not match their checksum"):
        module.decode()


def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_integrations", ROOT / "tools" / "build_integrations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_built_folder_reads_packed_files_without_this_repository(tmp_path: Path) -> None:
    path, tool = packed(tmp_path, bits=4), builder()
    folder = tool.build("comfyui", tmp_path / "custom_nodes")
    assert tool.build("comfyui", tmp_path / "custom_nodes") == folder  # in the place of the first
    for file in folder.glob("*.py"):
        assert "from lora_compress" not in file.read_text(encoding="utf-8")
    script = (
        "import importlib, sys; from safetensors.torch import load_file\n"
        f"held = importlib.import_module('{tool.VENDORED}.packed.in_memory').packed_modules(load_file({str(path)!r}))\n"
        "assert 'lora_compress' not in sys.modules\n"
        "print(sum(float(module.decode().up.abs().sum()) for module in held.values()))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = sum(float(update.up.abs().sum()) for update in load_lora(path).updates.values())
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6)
