"""`resize_lora_ext.py compare A B`: how far apart two files are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.table import Table

from ..inspection.comparison import FileComparison, ModuleComparison, compare_files
from ..update import relative_error
from . import paths
from .arguments import Parser, UsageError, add_scale_flags, scale_options
from .console import cell, megabytes, print_json, print_notes, quiet_stdout, show

__all__ = ["run"]

_WORST = 10


def run(argv: Sequence[str]) -> int:
    """Compare what the flags name; see `main` for the exit status."""
    parser = Parser(
        prog="resize_lora_ext.py compare",
        description="Relative Frobenius error of B's updates from A's, by module and in all. "
        "A module that one file lacks counts as zero there.",
    )
    parser.add_argument("files", nargs="*", metavar="A B", help="the reference, and the file that is compared with it")
    parser.add_argument("--model", metavar="A", help="the reference, in place of the first name")
    parser.add_argument(
        "--other", metavar="B", help="the file that is compared with it; layout and ranks may differ, packed or plain"
    )
    add_scale_flags(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    parser.add_argument("--verbose", action="store_true", help="all modules, not only those with the largest errors")
    args = parser.parse(argv)
    first, second = _files(args)
    scale = scale_options(args)
    with quiet_stdout() as warned:
        comparison = compare_files(first, second, **scale)
    if args.json:
        print_json({**comparison.as_json(), "notes": [*comparison.notes, *warned]})
    else:
        show(_parts(comparison), _modules(comparison, args.verbose), *_closing(comparison))
        print_notes([*comparison.notes, *warned])
    return 0


def _files(args: argparse.Namespace) -> tuple[str, str]:
    """Return the two files, named by their places or by flags.

    Raises:
        UsageError: there are not two of them, or they are named in both ways.
    """
    if not args.files:
        return paths.check_input(args.model), paths.check_input(args.other, "--other")
    if len(args.files) != 2 or args.model is not None or args.other is not None:
        found = " ".join([*args.files, *(f"--{name}" for name in ("model", "other") if getattr(args, name) is not None)])
        raise UsageError(f"{found}: two files are compared: compare A B, or compare --model A --other B")
    first, second = (paths.check_input(path) for path in args.files)
    return first, second


def _parts(comparison: FileComparison) -> Table:
    parts: dict[str, list[ModuleComparison]] = {}
    for module in comparison.modules:
        parts.setdefault(module.part, []).append(module)
    table = _table("part", "modules", title=" against ".join(comparison.paths))
    for name, modules in parts.items():
        table.add_row(cell(name), str(len(modules)), *_numbers(modules))
    if len(parts) > 1:
        table.add_row("all", str(len(comparison.modules)), *_numbers(comparison.modules))
    return table


def _modules(comparison: FileComparison, every: bool) -> Table:
    modules = sorted(comparison.modules, key=lambda module: -module.relative_error)
    shown = comparison.modules if every else modules[:_WORST]
    table = _table("module", "part", title="modules" if every or len(modules) <= _WORST else f"the {_WORST} largest errors")
    for module in shown:
        table.add_row(cell(module.name), cell(module.part), *_numbers([module]))
    return table


def _table(*headings: str, title: str) -> Table:
    table = Table(title=cell(title))
    for heading in headings:
        table.add_column(heading, overflow="fold")  # names are there to be copied
    for heading in ("components (rank)", "size", "relative error"):
        table.add_column(heading, justify="right")
    return table


def _numbers(modules: Sequence[ModuleComparison]) -> tuple[str, str, str]:
    ranks, sizes = ([sum(getattr(m, what)[i] for m in modules) for i in (0, 1)] for what in ("rank", "bytes"))
    error = relative_error(sum(m.squared_error for m in modules), sum(m.squared_norm for m in modules))
    return f"{ranks[0]} / {ranks[1]}", f"{megabytes(sizes[0])} / {megabytes(sizes[1])}", f"{100 * error:.3g}%"


def _closing(comparison: FileComparison) -> list[str]:
    first, second = comparison.bytes
    lines = [f"relative error {100 * comparison.relative_error:.4g}%, {megabytes(first)} against {megabytes(second)}"]
    for path, names in zip(comparison.paths, comparison.missing, strict=True):
        if names:
            lines.append(f"{path} lacks {len(names)} modules, counted as zero: {_first_of(names)}")
    if comparison.others:
        lines.append(f"{len(comparison.others)} tensors outside of updates differ: {_first_of(comparison.others)}")
    return lines


def _first_of(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f", and {len(names) - count} more" if len(names) > count else "")
