"""`resize_lora_ext.py check --model FILE --for comfyui`: which programs open a file, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..programs.check import Verdict, check_file
from . import paths
from .arguments import Parser, add_program_flag
from .console import cell, print_json, print_notes, quiet_stdout, show

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Check what the flags name; 0 where every program that was asked for opens the file, 1 where one does not."""
    parser = Parser(
        prog="resize_lora_ext.py check",
        description="Which programs open a LoRA file as it is and compute what it says. Exit status 1 where one of them does not.",
    )
    parser.add_argument("--model", metavar="FILE", help="LoRA file of any layout, packed or plain")
    add_program_flag(parser, "the programs to ask about; default all")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    args = parser.parse(argv)
    path = paths.check_input(args.model)
    with quiet_stdout() as warned:
        verdicts = check_file(path, args.consumers or ["all"])
    if args.json:
        print_json({"model": str(path), "programs": [verdict.as_json() for verdict in verdicts], "notes": warned})
    else:
        show(_table(verdicts))
        print_notes(warned)
    return 0 if all(verdict.opens for verdict in verdicts) else 1


def _table(verdicts: Sequence[Verdict]) -> Table:
    table = Table("program", "opens it", "why not, what it needs or leaves out")
    for verdict in verdicts:
        told = Text("\n").join(map(cell, verdict.reasons + verdict.notes))
        table.add_row(cell(verdict.title), "yes" if verdict.opens else "no", told)
    return table
