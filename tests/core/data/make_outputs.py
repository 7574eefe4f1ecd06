"""Write outputs.json and close.safetensors, what every run of `core.runs` makes today.

    python tests/core/data/make_outputs.py

They hold the bytes that files have had since before the core was put into rooms (commit 143d7ba writes the same ones).
Run this again only where a change of the bytes is meant, and say in the commit which runs changed and why.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

DATA = Path(__file__).resolve().parent
sys.path[:0] = [str(DATA.parents[2]), str(DATA.parents[1])]

from core.digests import file_digest, told_error  # noqa: E402
from core.runs import CLOSE, RUNS  # noqa: E402


def main() -> None:
    """Repeat every run and write what came out."""
    found = {}
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = run.files(Path(folder))
            if name == CLOSE:
                shutil.copyfile(paths[0], DATA / "close.safetensors")
                continue
            found[name] = {path.name: [path.stat().st_size, told_error(path), file_digest(path)] for path in paths}
    (DATA / "outputs.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
