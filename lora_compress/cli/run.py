"""`resize_lora_ext.py run SCRIPT ...`: a script that reads LoRA with safetensors' load_file reads packed files too."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import UsageError
from .paths import check_input

__all__ = ["run"]

_USAGE = """usage: resize_lora_ext.py run SCRIPT [ARGUMENTS]

Run a Python script with its arguments, as `python SCRIPT ARGUMENTS` does. Where it reads a file with safetensors.torch.load_file, a
packed LoRA gives it what the expanded file would. sd-scripts' merging and minimal inference scripts read LoRA that way:

    python resize_lora_ext.py run networks/merge_lora.py --models packed.safetensors ...
"""


def run(argv: Sequence[str]) -> int:
    """Run the script that comes first; what follows is the script's own. See `main` for the exit status."""
    if argv[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return 0
    if not argv or argv[0].startswith("-"):
        raise UsageError(f"{' '.join(['run', *argv[:1]])}: the script comes first: resize_lora_ext.py run SCRIPT [ARGUMENTS]")
    script = Path(check_input(argv[0], "run"))
    _teach_load_file()
    sys.argv = [argv[0], *argv[1:]]
    sys.path[0] = str(script.resolve().parent)  # instead of ours, whose `library` and `networks` would hide a host's
    runpy.run_path(argv[0], run_name="__main__")
    return 0


def _teach_load_file() -> None:
    import safetensors.torch

    from ..engine.unpack import read_expanded
    from ..packed.file import is_packed

    plain = safetensors.torch.load_file

    def load_file(filename: str | os.PathLike[str], device: Any = "cpu") -> Any:
        if not (os.path.isfile(filename) and is_packed(filename)):
            return plain(filename, device)
        return {key: tensor.to(device) for key, tensor in read_expanded(filename).items()}

    safetensors.torch.load_file = load_file
