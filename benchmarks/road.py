"""How many modules and functions of ours a run passes through: python benchmarks/road.py [--list] [--json OUT.json]

Three runs, each in a fresh process on a small file that is made on the spot: the command with `--new_rank 8`, the command with
`--target_size` and `strategy=entropy`, and `load_lora` of what the second one wrote. `sys.setprofile` and `threading.setprofile`
report every call, so that the threads of a run count too. A function counts once, however often it is called; a module counts if
one of its functions does. What runs while a module is imported does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from lora_files import write_lora  # noqa: E402
from measure import answer, fresh  # noqa: E402

__all__ = ["RUNS", "Road", "passed", "table"]

PACKAGE = ROOT / "lora_compress"
RUNS = {
    "new_rank": "`--new_rank 8`",
    "target_size": "`--target_size 100kB`, `strategy=entropy`",
    "load": "`load_lora` of that packed file",
}
_OPTIMIZED = 0x1  # CO_OPTIMIZED of inspect: set for functions, not for the bodies of modules and classes
_INNER = ("<lambda>", "<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>")  # parts of the function that they stand in


class Road:
    """The functions under a folder that were called while it was open, in any thread that was started meanwhile.

    Args:
        folder: whose files count.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder.resolve()) + os.sep
        self._codes: set[CodeType] = set()

    @property
    def functions(self) -> set[tuple[str, int, str]]:
        """File below the folder, first line and name."""
        return {
            (code.co_filename.removeprefix(self._folder).replace(os.sep, "/"), code.co_firstlineno, code.co_name)
            for code in self._codes
            if code.co_filename.startswith(self._folder) and code.co_flags & _OPTIMIZED and code.co_name not in _INNER
        }

    @property
    def modules(self) -> dict[str, int]:
        """Functions that were called, by file."""
        return dict(sorted(Counter(file for file, _, _ in self.functions).items()))

    @contextmanager
    def open(self) -> Iterator[Road]:
        """Look on, and put back who looked on before."""
        before, codes = sys.getprofile(), self._codes

        def called(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code not in codes and not _is_importing(frame):
                codes.add(frame.f_code)

        threading.setprofile(called)
        sys.setprofile(called)
        try:
            yield self
        finally:
            sys.setprofile(before)
            threading.setprofile(None)  # type: ignore[arg-type]


def _is_importing(frame: FrameType | None) -> bool:
    """Whether an import statement is under way in this thread."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _work(run: str, folder: Path) -> Callable[[], Any]:
    source, packed = str(folder / "lora.safetensors"), str(folder / "packed.safetensors")
    if run == "load":
        from lora_compress import load_lora

        return lambda: load_lora(packed)
    from lora_compress.cli.main import main as command

    asked = {
        "new_rank": ["--save_to", str(folder / "small.safetensors"), "--new_rank", "8"],
        "target_size": ["--save_to", packed, "--target_size", "100kB", "--quantize", "strategy=entropy"],
    }[run]

    def compress() -> None:
        if command(["--model", source, *asked]) or not Path(asked[1]).exists():
            raise RuntimeError(f"{' '.join(asked)}: wrote no file")

    return compress


def trace(run: str, folder: str) -> dict[str, Any]:
    """One of RUNS on the files of `folder`: its functions by module."""
    work = _work(run, Path(folder))
    with Road(PACKAGE).open() as road:
        work()
    return {"modules": road.modules}


def passed(folder: Path) -> dict[str, dict[str, int]]:
    """Functions by module of each of RUNS, on a LoRA of seven modules of rank 16."""
    write_lora(folder / "lora.safetensors", "sd15", 16, every=40)
    return {run: fresh(Path(__file__), "trace", run=run, folder=folder).said["modules"] for run in RUNS}


def table(found: dict[str, dict[str, int]]) -> str:
    """Modules and functions of each run, as Markdown."""
    lines = [f"| {RUNS[run]} | {len(modules)} | {sum(modules.values())} |" for run, modules in found.items()]
    return "\n".join(["| run | modules | functions |", "|---|---|---|", *lines])


def listing(found: dict[str, dict[str, int]]) -> str:
    """Functions of each module in each run, as Markdown."""
    files = sorted({file for modules in found.values() for file in modules})
    lines = [f"| {file} | " + " | ".join(str(modules.get(file, "")) for modules in found.values()) + " |" for file in files]
    return "\n".join([f"| module | {' | '.join(found)} |", f"|---|{'---|' * len(found)}", *lines])


def main() -> None:
    """Measure and print."""
    if answer({"trace": trace}, sys.argv[1:]):
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="functions of every module, too")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = passed(Path(folder))
    print(table(found) + ("\n\n" + listing(found) if args.list else ""))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
