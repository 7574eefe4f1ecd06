"""The extension in the loaders of AUTOMATIC1111, Forge and reForge: a packed file does to weights what the expanded one does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from consumers.conftest import absent
from consumers.test_held import builder
from consumers.webui_worker import STRENGTHS, layers
from core.factories import dense, random_update
from safetensors.torch import load_file, save_file

from lora_compress import CompressionSettings, LowRankUpdate, as_kohya, compress_file, expand_file, load_lora

SETTINGS: tuple[dict[str, object], ...] = (
    {"bits": 4},
    {"bits": 5, "strategy": "entropy"},
    {"bits": 4, "strategy": "nf4"},
    {"bits": 8, "channel_threshold": 0.5},
)


def updates(seed: int) -> dict[str, LowRankUpdate]:
    found = {}
    for number, (name, layer) in enumerate(layers().items()):
        out, inputs, *kernel = layer.weight.shape  # type: ignore[union-attr]
        found[name] = random_update(2 + number, inputs, out, tuple(kernel), 1.0 + number, seed + number, 0.3)
    return found


def write_files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Packed and expanded."""
    for number, settings in enumerate(SETTINGS):
        tensors = {key: tensor.contiguous() for key, tensor in as_kohya(updates(10 * number)).items()}
        save_file(tensors, folder / "in.safetensors")
        packed, plain = folder / f"{number}-packed.safetensors", folder / f"{number}-plain.safetensors"
        compress_file(folder / "in.safetensors", packed, CompressionSettings.parse(settings))
        expand_file(packed, plain, save_dtype=torch.float32)
        yield packed, plain


@pytest.fixture(params=["a1111", "forge", "reforge"])
def host(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A web page and its checkout."""
    variable = f"{request.param.upper()}_DIR"
    if not os.environ.get(variable):
        absent(f"{request.param} is absent: set {variable} to a checkout of it")
    return request.param, Path(os.environ[variable])


def test_packed_files_do_what_the_expanded_ones_do(host: tuple[str, Path], tmp_path: Path) -> None:
    """Of every codec, at strengths 1, -0.7 and 0; and both do what plain arithmetic does."""
    name, root = host
    extension = builder().build("a1111", tmp_path / "extensions")
    packed, plain = zip(*write_files(tmp_path), strict=True)
    weights = []
    for kind, files in (("packed", packed), ("plain", plain)):
        out = tmp_path / f"{kind}.out.safetensors"
        worker = Path(__file__).with_name("webui_worker.py")
        command = [sys.executable, worker, name, root, extension, *files, out]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "mismatch" not in done.stdout.lower()
        weights.append(load_file(out))
    ours, theirs = weights
    assert ours.keys() == theirs.keys()
    base = layers()
    for number, file in enumerate(packed):
        for module, update in load_lora(file).updates.items():
            key = f"{number}.{module}"
            before = base[module].weight.detach()  # type: ignore[union-attr]
            expected = before + STRENGTHS.get(number, 1.0) * dense(update).float().reshape(before.shape)
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
            torch.testing.assert_close(ours[key], expected, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
            assert torch.equal(ours[key], before) == (STRENGTHS.get(number) == 0.0)


def test_the_tensors_of_a_packed_file_become_one_key_for_each_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the extension that needs no host."""
    monkeypatch.syspath_prepend(str(builder().build("a1111", tmp_path / "extensions")))
    opening = __import__("lora_compress_webui.opening").opening
    packed, plain = next(iter(write_files(tmp_path)))
    tensors, expected = opening.by_module(load_file(packed) | {"a.dora_scale": torch.ones(1)}), load_lora(packed).updates
    assert set(tensors) == {f"{name}.{opening.MODULE}" for name in expected} | {"a.dora_scale"}
    for name, update in expected.items():
        assert torch.equal(tensors[f"{name}.{opening.MODULE}"].decode().up, update.up)
    untouched = load_file(plain)
    assert opening.by_module(untouched) is untouched
