"""One self-contained HTML page about a compressed file: no network, no script from elsewhere, light and dark."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from importlib.resources import files
from string import Template
from typing import Any

from ..files.writer import atomic_path
from ..text import as_html
from .charts import size_text
from .file_report import FileReport, ModuleReport
from .html_charts import bytes_chart, curve_chart, spectrum_overview, worst_spectra
from .html_heat import heat_maps

__all__ = ["file_body", "html_page", "page", "tiles", "write_html", "write_page"]

_HEADINGS = (
    ("module", "its name in the file", ""),
    ("part", "of the model", ""),
    ("weight", "shape of the layer's weight: out x in x kernel", "n"),
    ("rank", "components kept, of those the input has", "n"),
    ("bits", "bits per stored weight, side information included", "n"),
    ("size, kB", "bytes after compression", "n"),
    ("was, kB", "bytes in the input", "n"),
    ("error, %", "relative error of the update", "n"),
    ("share, %", "of the file's squared error", "n"),
)


def write_html(report: FileReport, path: str | os.PathLike[str]) -> None:
    """Write `html_page(report)` to `path`, whole or not at all.

    Raises:
        SaveError: the file cannot be written.
    """
    write_page(html_page(report), path)


def write_page(text: str, path: str | os.PathLike[str]) -> None:
    """Write a page, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def html_page(report: FileReport) -> str:
    """The page: headline numbers, bytes, size-error curve, ranks and bits by block, spectra, table of modules, notes, settings."""
    name = os.path.basename(report.input)
    lead = f"{as_html(report.input)} &rarr; {as_html(report.output or 'nothing written')}"
    about = f"{report.layout} layout, {report.family} family, status {report.status.replace('_', ' ')}"
    body = tiles(_headline(report)) + file_body(report)
    return page(name, lead, as_html(about), body, report.notes, report.settings)


def file_body(report: FileReport) -> str:
    """The sections about a file."""
    sections = [
        f'<div class="pair">{bytes_chart(report)}{curve_chart(report)}</div>',
        f"<section><h2>Rank and bits by block</h2>{heat_maps(report.modules)}</section>",
        _spectra(report.modules),
        _table(report.modules),
    ]
    return "".join(sections)


def page(
    title: str,
    lead: str,
    about: str,
    body: str,
    notes: Iterable[str],
    settings: Mapping[str, Any],
) -> str:
    """Put a page together; `lead`, `about` and `body` are HTML, everything else is text."""
    return Template(_part("page.html")).substitute(
        title=as_html(title),
        lead=lead,
        about=about,
        body=body,
        notes="".join(f"<li>{as_html(note)}</li>" for note in dict.fromkeys(notes)) or "<li>Nothing to tell.</li>",
        settings="".join(
            f"<tr><th>{as_html(name)}</th><td>{'&ndash;' if value is None else as_html(value)}</td></tr>"
            for name, value in settings.items()
        ),
        style=_part("page.css"),
        script=_part("page.js"),
    )


def tiles(numbers: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: (value, what it is, a remark)."""
    cells = "".join(
        f'<div class="tile"><dt>{as_html(label)}</dt><dd><b>{as_html(value)}</b><span>{as_html(remark)}</span></dd></div>'
        for value, label, remark in numbers
    )
    return f'<dl class="tiles">{cells}</dl>'


def _headline(report: FileReport) -> list[tuple[str, str, str]]:
    before, after = report.bytes
    kept = sum(1 for module in report.modules if module.rank[1])
    components = [sum(module.rank[side] for module in report.modules) for side in (0, 1)]
    return [
        (size_text(after), "size", f"was {size_text(before)}"),
        (f"{before / after:.1f}×" if after else "–", "smaller", f"{after / before:.1%} of the input" if before else ""),
        (_known(report.relative_error, ".2%"), "relative error", "of the update, Frobenius norm"),
        (_known(report.bits_per_weight, ".2f"), "bits per weight", "header and all"),
        (f"{kept}" if report.output else "–", "modules", f"of {len(report.modules)}"),
        (f"{components[1]:,}" if report.output else "–", "components", f"of {components[0]:,}"),
        (f"{report.seconds:.1f} s", "time", ""),
    ]


def _spectra(modules: tuple[ModuleReport, ...]) -> str:
    if not any(module.sigma for module in modules):
        return ""
    return f"<section><h2>Spectra</h2>{spectrum_overview(modules)}{worst_spectra(modules)}</section>"


def _table(modules: tuple[ModuleReport, ...]) -> str:
    total = sum(module.squared_error for module in modules)
    headings = "".join(
        f'<th class="{kind}" title="{hint}" aria-sort="none"><button>{name}</button></th>' for name, hint, kind in _HEADINGS
    )
    rows = "".join(_row(module, total) for module in modules)
    return (
        '<section><h2>Modules</h2><input type="search" placeholder="filter by name" aria-label="filter by name">'
        f'<div class="scroll"><table class="modules"><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</section>"
    )


def _known(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _row(module: ModuleReport, total: float) -> str:
    share = 100 * module.squared_error / total if total else 0.0
    kept = f"{module.rank[1]}" if module.rank[1] else "–" if math.isnan(module.squared_error) else "dropped"
    numbers = (
        (module.weights, " × ".join(map(str, module.shape))),
        (module.rank[1], f"{kept} / {module.rank[0]}"),
        (module.bits, f"{module.bits:.2f}" if module.rank[1] else "–"),
        (module.bytes[1], f"{module.bytes[1] / 1e3:,.1f}"),
        (module.bytes[0], f"{module.bytes[0] / 1e3:,.1f}"),
        (module.relative_error, _known(100 * module.relative_error, ".2f")),
        (share, _known(share, ".2f")),
    )
    cells = "".join(f'<td data-v="{-1 if math.isnan(value) else value:.6g}">{text}</td>' for value, text in numbers)
    return f"<tr><td>{as_html(module.name)}</td><td>{as_html(module.part)}</td>{cells}</tr>"


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
