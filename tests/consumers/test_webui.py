"""The extension in the loaders of AUTOMATIC1111, Forge, Forge Neo and reForge: a packed file does what the expanded
one does."""

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
from consumers.test_matrix import FORMATS
from consumers.webui_worker import STRENGTHS, layers
from core.factories import dense, random_update
from safetensors.torch import load_file, save_file

from lora_compress import CompressionSettings, LowRankUpdate, as_kohya, compress_file, expand_file, load_lora
from lora_compress.packed.file import PAYLOAD_KEY, is_packed

SETTINGS = (*FORMATS.values(), {"bits": 8, "channel_threshold": 0.5})


def updates(host: str, seed: int) -> dict[str, LowRankUpdate]:
    found = {}
    for number, (name, layer) in enumerate(layers(host).items()):
        out, inputs, *kernel = layer.weight.shape  # type: ignore[union-attr]
        found[name] = random_update(2 + number, inputs, out, tuple(kernel), 1.0 + number, seed + number, 0.3)
    return found


def write_files(folder: Path, host: str) -> Iterator[tuple[Path, Path]]:
    """Compressed and, where that is packed, expanded."""
    for number, settings in enumerate(SETTINGS):
        tensors = {key: tensor.contiguous() for key, tensor in as_kohya(updates(host, 10 * number)).items()}
        save_file(tensors, folder / "in.safetensors")
        small, plain = folder / f"{number}-small.safetensors", folder / f"{number}-plain.safetensors"
        compress_file(
            folder / "in.safetensors",
            small,
            CompressionSettings.parse({**settings, "allow_larger": True}),
            save_dtype=torch.float32,
        )
        if is_packed(small):
            expand_file(small, plain, save_dtype=torch.float32)
        yield small, plain if is_packed(small) else small


@pytest.fixture(params=["a1111", "forge", "forge_neo", "reforge"])
def host(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A web page and its checkout."""
    variable = f"{request.param.upper()}_DIR"
    if not os.environ.get(variable):
        absent(f"{request.param} is absent: set {variable} to a checkout of it")
    return request.param, Path(os.environ[variable])


def test_files_of_every_format_do_what_the_expanded_ones_do(host: tuple[str, Path], tmp_path: Path) -> None:
    """At strengths 1, -0.7 and 0; and both do what plain arithmetic does."""
    name, root = host
    extension = builder().build("a1111", tmp_path / "extensions")
    small, plain = zip(*write_files(tmp_path, name), strict=True)
    weights = []
    for kind, files in (("small", small), ("plain", plain)):
        out = tmp_path / f"{kind}.out.safetensors"
        worker = Path(__file__).with_name("webui_worker.py")
        command = [sys.executable, worker, name, root, extension, *files, out]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "mismatch" not in done.stdout.lower()
        weights.append(load_file(out))
    ours, theirs = weights
    assert ours.keys() == theirs.keys()
    base = layers(name)
    for number, file in enumerate(small):
        for module, update in load_lora(file).updates.items():
            key = f"{number}.{module}"
            before = base[module].weight.detach()  # type: ignore[union-attr]
            expected = before + STRENGTHS.get(number, 1.0) * dense(update).float().reshape(before.shape)
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
            torch.testing.assert_close(ours[key], expected, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
            assert torch.equal(ours[key], before) == (STRENGTHS.get(number) == 0.0)


def test_a_packed_file_that_cannot_be_applied_stops_the_page(host: tuple[str, Path], tmp_path: Path) -> None:
    """A damaged one and one of another model, both again after a good one: the host keeps what it has loaded before."""
    name, root = host
    if name not in ("forge", "forge_neo"):
        pytest.skip("the page of this host is not part of the worker")
    extension = builder().build("a1111", tmp_path / "extensions")
    good, _ = next(pair for pair in write_files(tmp_path, name) if is_packed(pair[0]))
    damaged, foreign = tmp_path / "damaged.safetensors", tmp_path / "foreign.safetensors"
    whole = load_file(good)
    save_file(whole | {PAYLOAD_KEY: whole[PAYLOAD_KEY][:-7].clone()}, damaged)
    other = {f"lora_unet_of_another_{number}": random_update(4, 24, 16) for number in range(20)}
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(other).items()}, tmp_path / "other.safetensors")
    compress_file(tmp_path / "other.safetensors", foreign, CompressionSettings.parse({"bits": 4}))
    worker = Path(__file__).with_name("webui_worker.py")
    command = [sys.executable, worker, name, root, extension, good, damaged, foreign, "refuse"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    messages = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(messages) == 4, done.stdout + done.stderr
    for first, second in (messages[:2], messages[2:]):
        assert "the index speaks of" in first
        assert "foreign.safetensors: the loaded model takes none of its 20 modules" in second


def test_the_tensors_of_a_packed_file_become_one_key_for_each_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the extension that needs no host."""
    monkeypatch.syspath_prepend(str(builder().build("a1111", tmp_path / "extensions")))
    opening = __import__("lora_compress_webui.opening").opening
    packed, plain = next(pair for pair in write_files(tmp_path, "forge") if is_packed(pair[0]))
    tensors, expected = opening.by_module(load_file(packed) | {"a.dora_scale": torch.ones(1)}), load_lora(packed).updates
    assert set(tensors) == {f"{name}.{opening.MODULE}" for name in expected} | {"a.dora_scale"}
    for name, update in expected.items():
        assert torch.equal(tensors[f"{name}.{opening.MODULE}"].decode().up, update.up)
    untouched = load_file(plain)
    assert opening.by_module(untouched) is untouched
