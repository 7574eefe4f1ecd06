"""Programs that open LoRA, where a checkout of theirs is at hand: COMFYUI_DIR, A1111_DIR, FORGE_DIR, FORGE_NEO_DIR,
REFORGE_DIR, INVOKEAI_DIR (the folder that holds its package), MUSUBI_DIR.

REQUIRE_CONSUMERS=1 makes each skip a failure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

# PEFT looks at torchao whatever model it is given, and the pinned PEFT does not fit the pinned torchao.
TORCHAO_ELSEWHERE = "torchao is not in this environment: test_diffusers_releases.py runs the test beside it"


def absent(reason: str) -> NoReturn:
    """Skip, or fail where every program is required."""
    if os.environ.get("REQUIRE_CONSUMERS") == "1":
        pytest.fail(f"{reason} (REQUIRE_CONSUMERS=1)")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def comfyui() -> Iterator[Path]:
    """The root of ComfyUI, importable in this process, on the CPU."""
    given = os.environ.get("COMFYUI_DIR")
    if not given:
        absent("ComfyUI is absent: set COMFYUI_DIR to a checkout of it, and install its requirements.txt")
    root = Path(given)
    from library.compress_torchvision import declare_missing_operators

    declare_missing_operators()
    sys.path.append(str(root))
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import nodes  # noqa: F401
    except ImportError as error:
        absent(f"ComfyUI in {root} cannot be imported ({error}): install its requirements.txt")
    yield root
    sys.path.remove(str(root))
