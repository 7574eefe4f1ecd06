"""inspect and compare as commands: their JSON, their tables, their exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from core.factories import mixed_updates
from safetensors.torch import load_file, save_file

from lora_compress import as_kohya
from lora_compress.cli import main


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "my [red]lora.safetensors"  # rich would read a style into it
    save_file(as_kohya(mixed_updates(rank=6)), path, {"ss_output_name": "x"})
    return path


def _json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict:
    assert main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_tells_what_is_in_a_file(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = _json(capsys, "inspect", "--model", lora, "--json")
    assert {
        "model",
        "layout",
        "family",
        "dtype",
        "bytes",
        "ranks",
        "effective_rank",
        "modules",
        "smaller",
        "notes",
        "metadata",
    } <= set(told)
    assert told["bytes"] == lora.stat().st_size and told["ranks"] == [6, 6]
    assert {"name", "part", "shape", "rank", "bytes", "norm", "effective_rank", "sigma"} == set(told["modules"][0])
    assert main(["inspect", "--model", str(lora), "--verbose"]) == 0
    shown = capsys.readouterr().out
    assert "[red]lora" in shown.replace("\n", "")
    assert "text encoder" in shown and "effective rank" in shown and "lora_unet_mid_block" in shown


def test_compare_tells_how_far_apart_files_are(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = tmp_path / "half.safetensors"
    save_file({key: tensor.half().float() for key, tensor in load_file(lora).items()}, half)
    told = _json(capsys, "compare", "--model", lora, "--other", half, "--json")
    assert 1e-5 < told["relative_error"] < 1e-3
    assert told["bytes_model"] == lora.stat().st_size and told["bytes_other"] == half.stat().st_size
    assert {"name", "part", "rank", "bytes", "relative_error"} == set(told["modules"][0]) and len(told["modules"]) == 4
    assert told["missing_in_other"] == told["missing_in_model"] == []
    assert _json(capsys, "compare", "--model", lora, "--other", lora, "--json")["relative_error"] == 0.0
    assert main(["compare", "--model", str(lora), "--other", str(half)]) == 0
    assert "relative error" in capsys.readouterr().out


def test_two_files_are_compared_by_their_places_or_by_flags(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = tmp_path / "half.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(lora).items()}, half)
    assert _json(capsys, "compare", lora, half, "--json") == _json(capsys, "compare", "--model", lora, "--other", half, "--json")
    for words in ([lora], [lora, half, lora], [lora, "--other", half]):
        assert main(["compare", *map(str, words)]) == 2
        assert "two files are compared: compare A B, or compare --model A --other B" in capsys.readouterr().err


def test_what_is_missing_is_listed_and_infinite_errors_are_null(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON has no infinity: a module of the second file alone has no relative error."""
    less = tmp_path / "less.safetensors"
    save_file({key: tensor for key, tensor in load_file(lora).items() if "mid_block" not in key}, less)
    told = _json(capsys, "compare", "--model", less, "--other", lora, "--json")
    assert told["missing_in_model"] == ["lora_unet_mid_block_attentions_0_proj_in"]
    assert next(m for m in told["modules"] if "mid_block" in m["name"])["relative_error"] is None
    assert main(["compare", "--model", str(less), "--other", str(lora)]) == 0
    assert "lacks 1 modules, counted as zero: lora_unet_mid_block_attentions_0_proj_in" in " ".join(capsys.readouterr().out.split())


def test_refused_inputs_end_with_one(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(lora.read_bytes()[:-100])
    for words in (["inspect", "--model", torn], ["compare", "--model", lora, "--other", torn]):
        assert main([str(word) for word in words]) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and "torn.safetensors" in shown.err and len(shown.err.splitlines()) == 1
    for words in (
        ["inspect"],
        ["inspect", "--model", "none.safetensors"],
        ["compare", "--model", str(lora)],
        ["inspect", "--rank", "3"],
    ):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith("error: ")
