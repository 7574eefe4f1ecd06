"""docs/format.md: its decoder, run as it stands there, reads what we write."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core.factories import mixed_updates

from lora_compress import CompressionSettings, compress, load_lora, save

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "format.md"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The names that the document's code defines; nothing of ours is at hand there."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.S)
    assert "lora_compress." not in code.replace('".lora_compress"', "")
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 8},
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 1024, "rank_ratio": 0.5, "min_rank": 1},
        {"bits": 4, "strategy": "nf4"},
        {"bits": 8, "strategy": "static"},
        {"bits": 4, "strategy": "static", "scale": 0.02},
    ],
    ids=str,
)
def test_the_documents_decoder_reads_our_files(values: dict[str, object], document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save(compress(mixed_updates(), CompressionSettings.parse(values)), path)
    decoded = document["decode_file"](path)
    updates = load_lora(path).updates
    assert len(decoded) == 3 * len(updates)
    for name, update in updates.items():
        assert torch.equal(torch.tensor(decoded[name + ".lora_down.weight"]), update.down)
        assert torch.equal(torch.tensor(decoded[name + ".lora_up.weight"]), update.up)
        assert float(decoded[name + ".alpha"]) == update.alpha


def test_the_documents_decoder_refuses_what_it_does_not_know(document: dict[str, Any]) -> None:
    decode: Callable[[bytes], object] = document["decode_record"]
    lora = compress(mixed_updates(), CompressionSettings.parse({"bits": 4}))
    record = bytes(next(iter(lora.tensors.values())).tolist())
    decode(record)
    for offset in (0, 2, 3, 4, 5):
        with pytest.raises(ValueError, match="not known"):
            decode(record[:offset] + b"\x09" + record[offset + 1 :])
    with pytest.raises(ValueError, match="cut or damaged"):
        decode(record[:-1])


def test_the_document_lists_every_metadata_key_that_is_written(tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for values in ({"bits": 4}, {"bits": 8, "strategy": "static"}):
        path = tmp_path / "lora.safetensors"
        save(compress(mixed_updates(), CompressionSettings.parse(values), metadata={"ss_network_dim": "8"}), path)
        for key in load_lora(path).metadata:
            assert f"`{key}`" in text, key
