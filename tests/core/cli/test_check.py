"""`check` tells of a finished file what each program makes of it, and agrees with what `--for` would do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core.factories import mixed_updates
from safetensors.torch import save_file

from lora_compress import LowRankUpdate, as_kohya
from lora_compress.cli.main import main
from lora_compress.programs.table import CONSUMERS


def usual() -> dict[str, LowRankUpdate]:
    """A file for SDXL by its names: InvokeAI asks for lora_te1_."""
    return {name.replace("lora_te_", "lora_te1_"): update for name, update in mixed_updates().items()}


def lora(path: Path, updates: dict[str, LowRankUpdate], **others: torch.Tensor) -> Path:
    save_file({key: tensor.half().contiguous() for key, tensor in as_kohya(updates).items()} | others, path)
    return path


def check(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    status = main(["check", "--model", str(path), "--json", *words])
    return status, {found["name"]: found for found in json.loads(capsys.readouterr().out)["programs"]}


def varied() -> dict[str, LowRankUpdate]:
    """Ranks and alphas that differ, rank 1 among them."""
    ranks = (1, 3, 4, 2)
    return {
        name: LowRankUpdate(update.down[:rank], update.up[:, :rank], 0.5 * rank)
        for (name, update), rank in zip(usual().items(), ranks, strict=True)
    }


def test_a_usual_file_is_opened_by_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = check(capsys, lora(tmp_path / "in.safetensors", usual()))
    assert status == 0 and found.keys() == CONSUMERS.keys()
    assert all(verdict["opens"] for verdict in found.values())


def test_the_remedy_that_is_told_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lora(tmp_path / "in.safetensors", varied())
    status, found = check(capsys, path)
    refusing = [name for name, verdict in found.items() if not verdict["opens"]]
    assert status == 1 and refusing == ["diffusers", "diffusers-0.40", "diffusers-0.32", "sdcpp"]
    assert "mixes up alphas" in found["diffusers"]["reasons"][0]
    assert "ranks under 2" in found["sdcpp"]["reasons"][0]
    for name in refusing:
        out = tmp_path / f"{name}.safetensors"
        assert main(["--model", str(path), "--save_to", str(out), "--for", name, "--allow_larger"]) == 0
        capsys.readouterr()
        assert check(capsys, out, "--for", name)[0] == 0


def test_packed_files_and_strange_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lora(tmp_path / "in.safetensors", usual(), bundle=torch.zeros(2))
    status, found = check(capsys, path, "--for", "diffusers,comfyui")
    assert status == 1 and list(found) == ["diffusers", "comfyui"]
    assert "keys such as bundle" in found["diffusers"]["reasons"][0] and "bundle" in found["comfyui"]["notes"][0]
    packed = tmp_path / "packed.safetensors"
    assert main(["--model", str(path), "--save_to", str(packed), "--quantize", "bits=4"]) == 0
    capsys.readouterr()
    status, found = check(capsys, packed)
    assert status == 1 and "plug-in" in found["comfyui"]["notes"][0] and "extension" in found["forge"]["notes"][0]
    assert "expand" in found["invokeai"]["reasons"][0]
    assert not found["diffusers"]["opens"] and "such as bundle" in found["diffusers"]["reasons"][0]
    for words in (("diffusers", "comfyui"), ("diffusers,", "comfyui"), ("diffusers", "--for", "comfyui")):
        assert list(check(capsys, packed, "--for", *words)[1]) == ["diffusers", "comfyui"]
    assert main(["check", "--model", str(packed), "--for", "comfyui"]) == 0
    assert "ComfyUI" in capsys.readouterr().out
    assert main(["check", "--model", str(packed), "--for", "comfy"]) == 2
