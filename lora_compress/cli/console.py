"""What a command shows: progress on stderr, a table at the end, warnings once, or one JSON object on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ..report.file_report import FileReport, ModuleReport
from ..text import visible
from ..update import relative_error
from .process import written

__all__ = [
    "cell",
    "megabytes",
    "print_json",
    "print_notes",
    "print_report",
    "progress",
    "quiet_stdout",
    "report_table",
    "say",
    "show",
]


@contextlib.contextmanager
def progress(title: str, unit: str = "module") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal; yields report(done, total)."""
    with tqdm(desc=visible(title), unit=unit, file=sys.stderr, leave=False, disable=None, dynamic_ncols=True) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


@contextlib.contextmanager
def quiet_stdout() -> Iterator[list[str]]:
    """Keep stdout for the result: what libraries print goes to stderr, and their warnings into the list that is yielded."""
    caught: list[str] = []
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for kind in (DeprecationWarning, PendingDeprecationWarning):  # for those who write libraries, not for those who use them
            warnings.simplefilter("ignore", kind)
        try:
            yield caught
        finally:
            caught += dict.fromkeys(str(warning.message) for warning in found)


def print_json(value: Any) -> None:
    """One JSON object on stdout, in ASCII; what JSON has no number for is null."""
    with written():
        print(json.dumps(_finite(value), allow_nan=False))


def show(*parts: Table | str) -> None:
    """Tables and lines on stdout, as wide as the terminal; 140 columns where there is none."""
    console = _Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140, highlight=False)
    with written():
        for part in parts:
            console.print(cell(part) if isinstance(part, str) else part)


def cell(text: str) -> Text:
    """A text of any origin as one line, or as a cell or the title of a table: nothing in it is taken for a style or a command."""
    return Text(visible(text))


def say(*lines: str) -> None:
    """Lines on stderr, each as one line whatever it holds; what cannot be written there is lost."""
    for line in lines:
        with contextlib.suppress(OSError):
            print(visible(line), file=sys.stderr, flush=True)


def print_notes(notes: Iterable[str]) -> None:
    """Each different note once, on stderr."""
    say(*(f"note: {note}" for note in dict.fromkeys(notes)))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the caller; rich would end the process."""
        raise


def print_report(report: FileReport, verbose: bool = False) -> None:
    """The table of one file, its numbers in a line, and with `verbose` a line for every module."""
    before, after = report.bytes
    if report.status == "not_smaller":
        show(
            f"nothing written: the result would take {megabytes(after)}, the input takes {megabytes(before)}; "
            "ask for fewer bits, a smaller rank or a larger error, or accept the size with --allow_larger"
        )
        return
    if verbose:
        show(*map(_module_line, report.modules))
    show(report_table(report))
    times = f", {before / after:.1f} times smaller" if after and before > after else ""
    show(
        f"{report.output}: {megabytes(before)} -> {megabytes(after)}{times}, error {report.relative_error:.2%}, "
        f"{report.bits_per_weight:.2f} bits per weight, {report.seconds:.1f} s"
    )
    if report.curve:
        show("at other sizes: " + ", ".join(f"{megabytes(size)}: {error:.1%}" for size, error in _spread(report.curve)))


def report_table(report: FileReport) -> Table:
    """Modules, components, bytes, bits and error for each part of the model and for all."""
    table = Table(title=cell(f"{report.input} ({report.layout}, {report.family})"))
    for heading in ("part", "modules", "components (rank)", "size", "bits per weight", "relative error"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    parts: dict[str, list[ModuleReport]] = {}
    for module in report.modules:
        parts.setdefault(module.part, []).append(module)
    for name, modules in [*parts.items(), *([("all", list(report.modules))] if len(parts) > 1 else [])]:
        table.add_row(cell(name), *_row(modules))
    return table


def megabytes(size: float) -> str:
    """Bytes in decimal units."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _row(modules: list[ModuleReport]) -> tuple[str, ...]:
    before, after = (sum(m.bytes[i] for m in modules) for i in (0, 1))
    weights = sum(m.weights for m in modules)
    error = relative_error(sum(m.squared_error for m in modules), sum(m.squared_norm for m in modules))
    return (
        f"{len(modules)} -> {sum(1 for m in modules if m.rank[1])}",
        f"{sum(m.rank[0] for m in modules)} -> {sum(m.rank[1] for m in modules)}",
        f"{megabytes(before)} -> {megabytes(after)}",
        f"{8 * after / weights:.2f}" if weights else "-",
        f"{error:.2%}",
    )


def _module_line(module: ModuleReport) -> str:
    """The numbers that sd-scripts' resize tool prints with --verbose, and the error, which those leave out."""
    sigma, kept = module.sigma, module.sigma[: module.rank[1]]
    if not kept or not sum(sigma):
        return f"{module.name:75} | dropped: {module.relative_error:.1%} error"
    total = sum(sigma)
    energy = math.fsum(value * value for value in kept) / math.fsum(value * value for value in sigma)
    return (
        f"{module.name:75} | sum(S) retained: {sum(kept) / total:.1%}, fro retained: {math.sqrt(energy):.1%}, "
        f"max(S) ratio: {kept[0] / kept[-1] if kept[-1] else math.inf:.1f}, "
        f"rank {module.rank[0]} -> {module.rank[1]}, {module.bits:.2f} bits, error {module.relative_error:.2%}"
    )


def _spread(curve: tuple[tuple[int, float], ...], count: int = 6) -> list[tuple[int, float]]:
    """At most `count` points of a curve, by falling size, evenly picked."""
    points = sorted(curve, reverse=True)
    if len(points) <= count:
        return points
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
