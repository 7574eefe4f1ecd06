"""The examples in docstrings do what they say. They run in a folder with three small files of one LoRA."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
from core.samples import kohya_file, packed_file

import lora_compress

PACKAGE = Path(lora_compress.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(("lora_compress", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
FILES = ("api", "engine.to_file", "engine.in_memory", "engine.unpack", "sources.open", "sources.load", "packed.file")


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_give_what_they_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name.removeprefix("lora_compress.") in FILES:
        source = kohya_file(tmp_path / "lora.safetensors", count=4, width=320, rank=8)
        packed_file("int4", source, tmp_path / "packed.safetensors")
        packed_file("progressive", source, tmp_path / "progressive.safetensors")
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, raise_on_error=False)
    assert found.attempted and not found.failed
