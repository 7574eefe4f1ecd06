"""Files that other programs change, replace or remove while they are read: a right result, or one line that says what happened."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from core.compressors import disturbed, lora_file
from core.fresh_process import ROOT
from safetensors.torch import load_file, save_file

from lora_compress import CompressionSettings, FormatError, LoraCompressError, SettingsError, compress_file, expand_file, load_lora
from lora_compress.batch import CompressOptions, Job, run_job, run_local, storage
from lora_compress.files.tensors import TensorFile
from lora_compress.inspection.comparison import compare_files
from lora_compress.inspection.file import inspect_file

KEY = "lora_unet_mid_block_attentions_0_proj_in"
HALF = CompressionSettings.parse({"rank_ratio": 0.5, "min_rank": 1})
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no way to change a file that is open")


def _one_line(error: str, path: Path) -> bool:
    return error.startswith(f"{path}: ") and "\n" not in error and "Error:" not in error


def _same(made: Path, expected: Path) -> bool:
    one, other = load_lora(made).updates, load_lora(expected).updates
    return one.keys() == other.keys() and all(
        torch.equal(one[n].up, u.up) and torch.equal(one[n].down, u.down) for n, u in other.items()
    )


def _grown(path: Path, modules: int) -> Path:
    """Give a file more modules, so that some are read after it was changed."""
    tensors = load_file(path)
    more = {key.replace("proj_in", f"proj_{i}"): value + i for key, value in tensors.items() for i in range(modules)}
    save_file({key: value.clone() for key, value in (tensors | more).items()}, path)
    return path


@posix
@pytest.mark.parametrize("settings", [{"rank_ratio": 0.5, "min_rank": 1}, {"bits": 4}, {"strategy": "entropy", "bits": 3}])
def test_files_that_change_under_a_batch_cost_themselves_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    """Each ends with the result of what was there when it was opened, or with one line that says what happened to it."""
    kinds = ("shrink", "grow", "vanish", "replace", "rewrite", "nothing")
    inputs = {kind: _grown(lora_file(tmp_path / "in" / f"{kind}-x.safetensors", seed), 40) for seed, kind in enumerate(kinds)}
    options = CompressOptions(CompressionSettings.parse(settings))
    for path in inputs.values():
        assert run_job(Job(str(path), str(tmp_path / "right" / path.name)), options)["status"] == "written"
    jobs = [Job(str(path), str(tmp_path / "out" / path.name)) for path in inputs.values()]
    outcomes = {Path(outcome["input"]).name.partition("-")[0]: outcome for outcome in run_local(jobs, options, 2, disturbed)}
    assert outcomes.keys() == inputs.keys() and outcomes["nothing"]["status"] == "written"
    for kind, outcome in outcomes.items():
        target = tmp_path / "out" / inputs[kind].name
        if outcome["status"] == "written":
            assert _same(target, tmp_path / "right" / target.name)
        else:
            assert outcome["status"] == "failed" and _one_line(outcome["error"], inputs[kind]) and not target.exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {path.name for path in inputs.values()}


@posix
def test_a_folder_that_another_program_works_on_is_compressed_all_the_same(tmp_path: Path) -> None:
    """The command itself, while a thread changes each input as soon as the file that becomes its output appears."""
    kinds = ("shrink", "replace", "rewrite", "vanish", "keep")
    folder, out, right = tmp_path / "in", tmp_path / "out", tmp_path / "right"
    inputs = [_grown(lora_file(folder / f"{kind}{i}.safetensors", i), 150) for kind in kinds for i in range(2)]
    other = _grown(lora_file(tmp_path / "other.safetensors", 9), 150)
    for path in (*inputs, other):
        compress_file(path, right / path.name, HALF)
    command = [sys.executable, "resize_lora_ext.py", "--model", folder, "--save_to", out, "--rank_ratio", "0.5", "--min_rank", "1"]
    batch = subprocess.Popen([*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waiting = {path.stem: path for path in inputs if not path.stem.startswith("keep")}

    def disturb() -> None:
        while waiting and batch.poll() is None:
            for stem in [stem for stem in waiting if any(out.glob(f".{stem}.*"))]:
                _change(waiting.pop(stem), other)
            time.sleep(0.001)

    thread = threading.Thread(target=disturb)
    thread.start()
    told, complaints = batch.communicate(timeout=300)
    thread.join()
    outcomes = {Path(file["input"]): file for file in json.loads(told)["files"]}
    assert len(waiting) < 8 and set(outcomes) == set(inputs) and "Traceback" not in complaints
    for path, outcome in outcomes.items():
        target = out / path.name
        if outcome["status"] == "failed":
            assert not path.stem.startswith("keep") and _one_line(outcome["error"], path) and not target.exists()
        else:
            assert outcome["status"] == "written" and any(_same(target, right / name) for name in (path.name, other.name))
    assert all(path.name in {each.name for each in inputs} for path in out.iterdir())
    assert batch.returncode == any(outcome["status"] == "failed" for outcome in outcomes.values())


def _change(path: Path, other: Path) -> None:
    match path.stem[:-1]:
        case "shrink":
            os.truncate(path, path.stat().st_size // 2)
        case "replace":
            os.replace(shutil.copy(other, path.with_suffix(".new")), path)
        case "rewrite":
            path.write_bytes(bytes(path.stat().st_size))
        case "vanish":
            path.unlink()


def _inputs(folder: Path) -> dict[str, Path]:
    """A file of each form that is opened in a way of its own."""
    files = {"plain": _grown(lora_file(folder / "plain" / "a.safetensors"), 3), "torch": folder / "torch" / "a.pt"}
    files["torch"].parent.mkdir()
    torch.save(load_file(files["plain"]), files["torch"])
    files["packed"] = folder / "packed" / "a.safetensors"
    compress_file(files["plain"], files["packed"], CompressionSettings.parse({"bits": 4, "allow_larger": True}))
    files["adapter"] = files["configuration"] = folder / "peft" / "adapter_model.safetensors"
    files["adapter"].parent.mkdir()
    name = "base_model.model.mid_block.attentions.0.proj_in"
    save_file({f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(64, 4)}, files["adapter"])
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["proj_in"]}
    files["adapter"].with_name("adapter_config.json").write_text(json.dumps(config))
    return files


def _in_a_batch(path: Path, out: Path) -> None:
    options = CompressOptions(HALF, copy_uncompressible=True)
    outcome = run_job(Job(str(path), str(out / "b" / path.name), path.with_name("adapter_config.json").exists()), options)
    if outcome["status"] == "failed":
        assert "Error:" not in outcome["error"]
        raise LoraCompressError(outcome["error"])


_WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "compress": lambda path, out: compress_file(path, out / "new.safetensors", HALF),
    "replace": lambda path, out: compress_file(path, out / "there.safetensors", HALF),
    "expand": lambda path, out: expand_file(path, out / "new.safetensors"),
    "inspect": lambda path, out: inspect_file(path),
    "compare": lambda path, out: compare_files(out / "there.safetensors", path),
    "load": lambda path, out: load_lora(path),
    "batch": _in_a_batch,
    "again": lambda path, out: (_in_a_batch(path, out), _in_a_batch(path, out)),
}


@posix
@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("form", ["plain", "torch", "packed", "adapter", "configuration"])
def test_a_file_that_vanishes_at_any_moment_is_one_clear_error(form: str, way: str, tmp_path: Path) -> None:
    """It is removed before the first, the second ... time that it is opened or looked at, until that never comes."""
    original, calls, was_removed = _inputs(tmp_path / "original")[form], 0, True
    while was_removed:
        place = tmp_path / str(calls)
        path = Path(shutil.copytree(original.parent, place / "in")) / original.name
        lora_file(place / "out" / "there.safetensors")
        victim = path.with_name("adapter_config.json") if form == "configuration" else path
        with _removed(victim, calls) as seen:
            try:
                _WAYS[way](path, place / "out")
            except LoraCompressError as error:
                assert "\n" not in str(error)
        assert not list((place / "out").rglob(".*"))
        calls, was_removed = calls + 1, seen() > calls
    assert calls > 1


@contextmanager
def _removed(victim: Path, calls: int) -> Iterator[Callable[[], int]]:
    """Remove a file before the call of that number which names it; gives the count of such calls."""
    count = 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *given: Any, **named: Any) -> Any:
            nonlocal count
            if not isinstance(path, int) and os.fspath(path) == str(victim):
                if count == calls:
                    victim.unlink(missing_ok=True)
                count += 1
            return function(path, *given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for holder, name in ((os, "stat"), (os, "open"), (io, "open"), (builtins, "open")):
            patch.setattr(holder, name, watched(getattr(holder, name)))
        yield lambda: count


def test_a_copy_of_a_file_that_is_written_to_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = lora_file(tmp_path / "a.safetensors", size=64), tmp_path / "out" / "a.safetensors"
    copy = shutil.copyfileobj

    def meanwhile(file: Any, to: Any) -> None:
        copy(file, to)
        os.truncate(source, 100)

    monkeypatch.setattr(storage.shutil, "copyfileobj", meanwhile)
    with pytest.raises(FormatError, match="another program has written to the file while it was copied"):
        storage.copy_file(str(source), str(target))
    assert not list(target.parent.iterdir())


def test_what_is_carried_is_not_read_to_know_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file, whose last tensor takes 3 GB as soon as it is read."""
    path, sizes = (
        tmp_path / "a.safetensors",
        {f"{KEY}.lora_down.weight": (4, 64), f"{KEY}.lora_up.weight": (64, 4), "carried": (750, 10**6)},
    )
    header, end = {}, 0
    for key, (rows, columns) in sizes.items():
        header[key] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [end, end + 4 * rows * columns]}
        end += 4 * rows * columns
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + torch.ones(512).numpy().tobytes())
    os.truncate(path, 8 + len(text) + end)
    read = TensorFile.read

    def small(file: TensorFile, key: str) -> torch.Tensor:
        assert key != "carried"
        return read(file, key)

    monkeypatch.setattr(TensorFile, "read", small)
    assert inspect_file(path).modules[0].name == KEY
    assert compress_file(path, tmp_path / "small.safetensors", CompressionSettings.parse({})).status == "not_smaller"
    with pytest.raises(SettingsError, match="too few: header, metadata and tensors that belong to no module take 3000000"):
        compress_file(path, tmp_path / "small.safetensors", CompressionSettings.parse({"target_size": "1MB"}))
