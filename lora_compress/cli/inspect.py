"""`resize_lora_ext.py inspect --model FILE`: what a file holds, and what a smaller one would cost."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.table import Table

from ..inspection.file import FileInspection, ModuleInspection, inspect_file, mean_effective_rank
from . import paths
from .arguments import Parser, add_scale_flags, scale_options
from .console import cell, megabytes, print_json, print_notes, quiet_stdout, show

__all__ = ["run"]

_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_BAR_COUNT = 20


def run(argv: Sequence[str]) -> int:
    """Inspect what the flags name; see `main` for the exit status."""
    parser = Parser(
        prog="resize_lora_ext.py inspect",
        description="Family, layout, modules, ranks, spectra and bytes of a LoRA file. Effective rank is exp of the entropy of the "
        "shares of sigma^2: how many components carry the energy.",
    )
    parser.add_argument("--model", metavar="FILE", help="LoRA file of any layout, packed or plain, or a folder that PEFT wrote")
    add_scale_flags(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout and nothing else there, spectra and metadata too"
    )
    parser.add_argument("--verbose", action="store_true", help="a line for every module")
    args = parser.parse(argv)
    path, scale = paths.check_input(args.model), scale_options(args)
    with quiet_stdout() as warned:
        found = inspect_file(path, **scale)
    if args.json:
        print_json({**found.as_json(), "notes": [*found.notes, *warned]})
    else:
        show(_head(found), _parts(found), *([_modules(found)] if args.verbose else []), *_smaller(found))
        print_notes([*found.notes, *warned])
    return 0


def _head(found: FileInspection) -> str:
    low, high = found.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return (
        f"{found.path}: {found.layout} layout, {found.family}, {len(found.modules)} modules of {ranks}, {found.stored_as}, "
        f"{megabytes(found.bytes)}"
    )


def _parts(found: FileInspection) -> Table:
    parts: dict[str, list[ModuleInspection]] = {}
    for module in found.modules:
        parts.setdefault(module.part, []).append(module)
    table = Table("part", title="by part")
    for heading in ("modules", "rank", "effective rank", "size", "norm of the update"):
        table.add_column(heading, justify="right")
    table.add_column("mean of sigma / sigma 1", min_width=_BAR_COUNT)
    for name, modules in parts.items():
        ranks = [module.rank for module in modules]
        table.add_row(
            cell(name),
            str(len(modules)),
            str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}",
            f"{mean_effective_rank(modules):.1f}",
            megabytes(sum(module.bytes for module in modules)),
            f"{sum(module.norm**2 for module in modules) ** 0.5:.4g}",
            _sparkline(_mean_spectrum(modules)),
        )
    return table


def _modules(found: FileInspection) -> Table:
    table = Table(title="modules")
    table.add_column("module", overflow="fold")
    table.add_column("weight")
    for heading in ("rank", "effective rank", "size", "norm", "sigma 1"):
        table.add_column(heading, justify="right")
    table.add_column("spectrum", min_width=_BAR_COUNT)
    for module in found.modules:
        first = module.sigma[0] if module.sigma else 0.0
        table.add_row(
            cell(module.name),
            " x ".join(map(str, module.shape)),
            str(module.rank),
            f"{module.effective_rank:.1f}",
            megabytes(module.bytes),
            f"{module.norm:.4g}",
            f"{first:.4g}",
            _sparkline([value / first for value in module.sigma] if first else []),
        )
    return table


def _smaller(found: FileInspection) -> Iterator[Table]:
    """Of each kind of file that would be smaller."""
    kinds = {
        f"smaller plain files in {found.curve_dtype}, by --target_error or --target_size": found.curve,
        "smaller packed files, by --quantize strategy=entropy and one of the two": found.packed_curve,
    }
    for title, curve in kinds.items():
        table = Table(title=title)
        for heading in ("size", "of this file", "relative error"):
            table.add_column(heading, justify="right")
        for size, error in curve:
            table.add_row(megabytes(size), f"{size / found.bytes:.0%}", f"{error:.1%}")
        if curve:
            yield table


def _mean_spectrum(modules: Sequence[ModuleInspection]) -> list[float]:
    """Mean of sigma_i / sigma_1 over the modules; a spectrum that has ended is 0."""
    spectra = [[value / m.sigma[0] for value in m.sigma] for m in modules if m.sigma and m.sigma[0] > 0.0]
    length = max(map(len, spectra), default=0)
    return [sum(spectrum[i] for spectrum in spectra if i < len(spectrum)) / len(spectra) for i in range(length)]


def _sparkline(values: Sequence[float]) -> str:
    """Values in [0, 1] as a row of bars, at most 20 of them."""
    if len(values) > _BAR_COUNT:
        values = [values[index * len(values) // _BAR_COUNT] for index in range(_BAR_COUNT)]
    bars = _BARS if _writes(_BARS) else _ASCII_BARS
    return "".join(bars[min(int(value * len(bars)), len(bars) - 1)] for value in values)


def _writes(text: str) -> bool:
    """Whether the encoding of standard output has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
