"""Packed files of an earlier version open to the bit: data/make_packed.py says what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from core.digests import digests, file_digest
from safetensors.torch import load_file

from lora_compress import expand_file, is_packed, load_compressed_lora

FOLDER = Path(__file__).with_name("data") / "packed"
RECORDED = json.loads((FOLDER.parent / "packed.json").read_text(encoding="utf-8"))


def test_every_file_is_recorded_and_they_stay_small() -> None:
    assert [path.stem for path in sorted(FOLDER.glob("*.safetensors"))] == list(RECORDED)
    assert sum(path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file()) < 150_000


@pytest.mark.parametrize("name", RECORDED)
def test_loading_gives_the_tensors_that_are_recorded(name: str) -> None:
    assert digests(load_compressed_lora(FOLDER / f"{name}.safetensors", torch.float32)) == RECORDED[name]["tensors"]


@pytest.mark.parametrize("name", [name for name, found in RECORDED.items() if "expanded" in found])
def test_expanding_gives_the_file_that_is_recorded(name: str, tmp_path: Path) -> None:
    path, plain = FOLDER / f"{name}.safetensors", tmp_path / "plain.safetensors"
    assert is_packed(path)
    expand_file(path, plain, save_dtype=torch.float32)
    assert file_digest(plain) == RECORDED[name]["expanded"]


def test_the_partner_of_both_holds_the_same_update() -> None:
    packed = load_compressed_lora(FOLDER / "int6_both.safetensors", torch.float32)
    partner = load_file(FOLDER / "int6_both.kohya.safetensors")
    assert packed.keys() == partner.keys()
    for key in (key.removesuffix(".alpha") for key in packed if key.endswith(".alpha")):
        deltas = []
        for tensors in (packed, partner):
            down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
            deltas.append(up.flatten(1) @ down.flatten(1) * float(tensors[f"{key}.alpha"]) / len(down))
        torch.testing.assert_close(deltas[0], deltas[1], rtol=0.0, atol=2.0**-18 * float(deltas[0].abs().max()))
