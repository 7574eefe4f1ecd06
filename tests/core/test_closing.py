"""Files that were looked at are closed again: on Windows a file that is held cannot be replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from core.samples import kohya_file, packed_file

from lora_compress.inspection.comparison import compare_files
from lora_compress.inspection.file import inspect_file, report_files
from lora_compress.programs.check import check_file

LOOKS: dict[str, Callable[[str, str], object]] = {
    "inspect": lambda plain, packed: (inspect_file(plain), inspect_file(packed)),
    "compare": compare_files,
    "report": report_files,
    "check": lambda plain, packed: (check_file(plain, ["all"]), check_file(packed, ["all"])),
}


def held(folder: Path) -> list[str]:
    """Files of a folder that this process has open or mapped into memory."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = [line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6]
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [name for name in (*mapped, *opened) if name.startswith(str(folder))]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")
@pytest.mark.parametrize("look", LOOKS)
def test_nothing_is_held_after_a_look(look: str, tmp_path: Path) -> None:
    plain = kohya_file(tmp_path / "lora.safetensors")
    packed = packed_file("int4", plain, tmp_path / "packed.safetensors")
    found = LOOKS[look](str(plain), str(packed))
    assert found is not None and not held(tmp_path)
