"""docs/format.md: its decoder, run as it stands there, reads what we write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from core.factories import mixed_updates
from safetensors.torch import save_file

from lora_compress import CompressionSettings, compress, compress_file, load_lora, save

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "format.md"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The names that the document's code defines; nothing of ours is at hand there."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.S)
    assert "import lora_compress" not in code
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names


@pytest.mark.parametrize(
    "values",
    [
        *({"bits": bits} for bits in (2, 3, 4, 5, 6, 8)),
        {"bits": 4, "group_size": 1024, "rank_ratio": 0.5, "min_rank": 1},
        {"bits": 4, "strategy": "nf4"},
        {"bits": 5, "strategy": "static"},
        {"bits": 4.2, "strategy": "mixed"},
        {"bits": 8, "channel_threshold": 0.6},
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


def test_the_documents_decoder_gives_back_other_layouts_and_passes_tensors_on(document: dict[str, Any], tmp_path: Path) -> None:
    source, path = tmp_path / "peft.safetensors", tmp_path / "small.safetensors"
    tensors = {"unet.a.to_q.lora_A.weight": torch.randn(4, 64), "unet.a.to_q.lora_B.weight": torch.randn(48, 4)}
    save_file({**tensors, "emb_params": torch.arange(6.0)}, source)
    compress_file(source, path, CompressionSettings.parse({"bits": 8}))
    decoded = document["decode_file"](path)
    assert decoded.keys() == {*tensors, "emb_params"}
    assert decoded["emb_params"].tolist() == [0, 1, 2, 3, 4, 5]
    before = tensors["unet.a.to_q.lora_B.weight"] @ tensors["unet.a.to_q.lora_A.weight"]
    after = torch.tensor(decoded["unet.a.to_q.lora_B.weight"]) @ torch.tensor(decoded["unet.a.to_q.lora_A.weight"])
    assert float((after - before).norm() / before.norm()) < 0.02


def test_the_documents_decoder_refuses_what_it_does_not_know(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save(compress(mixed_updates(), CompressionSettings.parse({"bits": 4})), path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"lora_compress_format":"1"', b'"lora_compress_format":"2"'))
    with pytest.raises(ValueError, match="packed format 2 is not known"):
        document["decode_file"](path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="cut or damaged"):
        document["decode_file"](path)
    with pytest.raises(ValueError, match="codec entropy is not known"):
        document["decode_module"]({"kernel": [], "rank": 1, "codec": "entropy", "parameters": {}}, [b""], [None, None])


def test_the_document_lists_every_metadata_key_that_is_written(tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for values in (
        {"bits": 4},
        {"bits": 8, "strategy": "static"},
        {"target_error": 0.1, "strategy": "entropy"},
        {"new_rank": 2, "layer_threshold": 0.01},
    ):
        path = tmp_path / "lora.safetensors"
        save(compress(mixed_updates(), CompressionSettings.parse(values), metadata={"ss_network_dim": "8"}), path)
        for key in load_lora(path).metadata:
            assert f"`{key}`" in text, key
