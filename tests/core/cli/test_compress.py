"""The compress, expand and truncate commands: what they hand on, what they print, their exit status."""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from core.compressors import lora_file, to_half
from safetensors.torch import load_file

from lora_compress import CompressionSettings, FormatError
from lora_compress.cli import main
from lora_compress.engine import to_file as file_pipeline
from lora_compress.engine import unpack as packed_files
from lora_compress.report.file_report import FileReport, ModuleReport

NUMBERS = {"input", "output", "bytes_in", "bytes_out", "relative_error", "bits_per_weight", "modules", "seconds", "status"}


def _report(source: str, target: str | None, status: str = "written") -> FileReport:
    modules = (
        ModuleReport("lora_unet_a", "U-Net", (64, 64), (4, 2), (1024, 256), 1.0, 4.0, (2.0, 1.5, 0.8, 0.6)),
        ModuleReport("lora_te_b", "text encoder", (64, 64), (4, 0), (1024, 0), 1.0, 1.0, (0.8, 0.6, 0.0, 0.0)),
    )
    curve = ((2000, 0.1), (500, 0.7))
    return FileReport(source, target, status, "kohya", "sd1", (2500, 700), 0.25, modules, ("alpha 0 was read as rank",), {}, curve)


class _Recorder:
    """Stands for `file_pipeline.compress_file`, notes what it was given and talks where a library would."""

    def __init__(self, status: str = "written") -> None:
        self.status = status
        self.given: dict[str, Any] = {}

    def __call__(self, source: str, target: str, settings: CompressionSettings, **options: Any) -> FileReport:
        self.given = {"source": source, "target": target, "settings": settings, **options}
        print("a library prints")
        for _ in range(3):
            warnings.warn("a library warns", stacklevel=1)
        options["progress"](1, 2)
        return _report(source, target if self.status == "written" else None, self.status)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    made = _Recorder()
    monkeypatch.setattr(file_pipeline, "compress_file", made, raising=False)
    return made


def _run(*words: str | Path) -> int:
    return main([str(word) for word in words])


def test_everything_asked_for_is_handed_on(recorder: _Recorder, tmp_path: Path) -> None:
    source, base = lora_file(tmp_path / "a.safetensors"), lora_file(tmp_path / "base.safetensors")
    flags = ["--rank_ratio", "0.5", "--save_precision", "bf16", "--for", "comfyui", "--base_model", base, "--calibration", base]
    assert _run("--model", source, "--save_to", tmp_path / "b.safetensors", *flags, "--force_resize") == 0
    given = recorder.given
    assert given.pop("settings") == CompressionSettings.parse({"rank_ratio": 0.5})
    assert callable(given.pop("progress"))
    assert given == {
        "source": str(source),
        "target": str(tmp_path / "b.safetensors"),
        "save_dtype": torch.bfloat16,
        "consumers": ("comfyui",),
        "base_model": str(base),
        "calibration": str(base),
        "force": False,
        "repair": True,
    }


def test_json_is_one_object_and_all_of_stdout(recorder: _Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lora_file(tmp_path / "a.safetensors")
    assert _run("--model", source, "--save_to", tmp_path / "b.safetensors", "--new_rank", "2", "--json") == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told.keys() >= NUMBERS and len(shown.out.splitlines()) == 1
    assert told["relative_error"] == pytest.approx((2 / 5) ** 0.5) and (told["bytes_in"], told["bytes_out"]) == (2500, 700)
    assert told["notes"] == ["alpha 0 was read as rank", "a library warns"]
    assert "a library prints" in shown.err


def test_the_table_and_every_note_once(recorder: _Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lora_file(tmp_path / "a.safetensors")
    words = ("--model", source, "--save_to", tmp_path / "b.safetensors", "--new_rank", "2", "--verbose", "--svd_lowrank_niter", "4")
    assert _run(*words) == 0
    shown = capsys.readouterr()
    text = " ".join(shown.out.split())
    for words in ("U-Net", "text encoder", "2 -> 1", "8 -> 2", "2.5 kB -> 0.7 kB", "63.25%", "at other sizes", "3.6 times smaller"):
        assert words in text, words
    assert "fro retained: 92.8%" in text and "max(S) ratio: 1.3" in text and "dropped" in text
    for note in ("alpha 0 was read as rank", "a library warns", "--svd_lowrank_niter has nothing to do here"):
        assert shown.err.count(note) == 1


def test_a_result_that_is_not_smaller_is_no_failure(
    recorder: _Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.status = "not_smaller"
    source = lora_file(tmp_path / "a.safetensors")
    assert _run("--model", source, "--save_to", tmp_path / "b.safetensors", "--new_rank", "2") == 0
    assert "nothing written" in capsys.readouterr().out
    assert _run("--model", source, "--save_to", tmp_path / "b.safetensors", "--new_rank", "2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "not_smaller" and told["output"] is None


def test_a_page_is_written_if_asked(recorder: _Recorder, tmp_path: Path) -> None:
    source, page = lora_file(tmp_path / "a.safetensors"), tmp_path / "new" / "page.html"
    assert _run("--model", source, "--save_to", tmp_path / "b.safetensors", "--new_rank", "2", "--report", page) == 0
    assert "lora_unet_a" in page.read_text(encoding="utf-8")


def test_refused_inputs_end_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any, **__: Any) -> FileReport:
        raise FormatError("a.safetensors: lora_unet_a: holds NaN")

    monkeypatch.setattr(file_pipeline, "compress_file", refuse, raising=False)
    source = lora_file(tmp_path / "a.safetensors")
    assert _run("--model", source, "--save_to", tmp_path / "b.safetensors", "--new_rank", "2") == 1
    assert capsys.readouterr().err == "error: a.safetensors: lora_unet_a: holds NaN\n"


def test_truncate_and_expand_hand_on_what_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def record(source: str, target: str, *rest: Any, **options: Any) -> FileReport:
        calls.append((source, target, rest, options))
        return _report(source, target)

    monkeypatch.setattr(packed_files, "truncate_file", record, raising=False)
    monkeypatch.setattr(packed_files, "expand_file", record, raising=False)
    source, target = lora_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    assert _run("--model", source, "--save_to", target, "--truncate", "8kB", "--json") == 0
    assert json.loads(capsys.readouterr().out).keys() >= NUMBERS
    assert _run("expand", "--model", source, "--save_to", target, "--save_precision", "fp16", "--json") == 0
    assert json.loads(capsys.readouterr().out).keys() >= NUMBERS
    assert calls == [
        (str(source), str(target), (8000,), {"force": False}),
        (str(source), str(target), (), {"save_dtype": torch.float16, "force": False}),
    ]
    assert _run("expand", "--model", source, "--save_to", source) == 2
    assert "is the input" in capsys.readouterr().err


def test_a_batch_tells_what_became_of_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli_batch = sys.modules["lora_compress.cli.batch"]
    run_local = cli_batch.run_local  # type: ignore[attr-defined]
    monkeypatch.setattr(cli_batch, "run_local", lambda jobs, options: run_local(jobs, options, 1, to_half))
    for index, marker in enumerate((None, "bad", "compact")):
        lora_file(tmp_path / "in" / f"{index}.safetensors", index, marker=marker)
    lora_file(tmp_path / "in" / "deeper" / "0.safetensors", 3)
    words = ("--model", tmp_path / "in", "--save_to", tmp_path / "out", "--new_rank", "2", "--report", tmp_path / "page.html")
    assert _run(*words, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert [file["status"] for file in told["files"]] == ["written", "failed", "not_smaller", "written"]
    assert (told["written"], told["failed"], told["not_smaller"], told["skipped"]) == (2, 1, 1, 0)
    assert told["bytes_in"] == sum((tmp_path / "in" / name / "0.safetensors").stat().st_size for name in ("", "deeper"))
    assert "1.safetensors" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert _run(*words) == 1
    shown = capsys.readouterr().out
    rows = [line.split()[1] for line in shown.splitlines() if ".safetensors " in line and "error" not in line]
    assert rows == ["0.safetensors", "1.safetensors", "2.safetensors", "deeper/0.safetensors"]
    assert "skipped" in shown and "is refused" in " ".join(shown.split())
    (tmp_path / "in" / "1.safetensors").unlink()
    assert _run(*words, "--copy_uncompressible") == 0
    assert load_file(tmp_path / "out" / "2.safetensors").keys() == load_file(tmp_path / "in" / "2.safetensors").keys()


def test_one_file_by_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(file_pipeline, "compress_file", partial(to_half, details={}))
    memory = fsspec.filesystem("memory")
    try:
        for name, marker in (("a", None), ("bad", "bad")):
            local = lora_file(tmp_path / f"{name}.safetensors", marker=marker)
            memory.put_file(str(local), f"/one/{name}.safetensors")
        words = ("--model", "memory://one/a.safetensors", "--save_to", "memory://one/out/a.safetensors", "--new_rank", 2)
        assert _run(*words, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["input"], told["output"]) == (words[1], words[3])
        memory.get_file("/one/out/a.safetensors", str(tmp_path / "out.safetensors"))
        assert {tensor.dtype for tensor in load_file(tmp_path / "out.safetensors").values()} == {torch.float16}

        assert _run("--model", "memory://one/bad.safetensors", *words[2:]) == 1
        assert "memory://one/bad.safetensors: bad: is refused" in capsys.readouterr().err
        assert _run("--model", "memory://one/none.safetensors", *words[2:]) == 2
        assert _run(*words[:2], "--save_to", "memory://one/a.ckpt", "--new_rank", 2) == 2
        assert "write memory://one/a.safetensors" in capsys.readouterr().err
        assert _run("inspect", *words[:2]) == 2
        assert "download the file first" in capsys.readouterr().err
        assert memory.find("/one/out") == ["/one/out/a.safetensors"]
    finally:
        if memory.exists("/one"):
            memory.rm("/one", recursive=True)


def test_a_service_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    memory = pytest.importorskip("fsspec.implementations.memory")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError("nobody answers")

    monkeypatch.setattr(memory.MemoryFileSystem, "info", fail)
    monkeypatch.setattr(memory.MemoryFileSystem, "isfile", fail)
    assert _run("--model", "memory://one/a.safetensors", "--save_to", "out.safetensors", "--new_rank", 2) == 1
    error = capsys.readouterr().err
    assert "memory://one/a.safetensors: cannot be reached (ConnectionRefusedError: nobody answers)" in error
