"""The HTML page of a batch: all files in one table, and the settings they share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..text import as_html
from .charts import size_text
from .html import page, tiles, write_page

__all__ = ["batch_page", "write_batch_html"]

_HEADINGS = (
    ("file", ""),
    ("status", ""),
    ("size, MB", "n"),
    ("was, MB", "n"),
    ("error, %", "n"),
    ("bits per weight", "n"),
    ("modules", "n"),
    ("time, s", "n"),
)
_NUMBERS = (
    ("bytes_out", 1e-6),
    ("bytes_in", 1e-6),
    ("relative_error", 100),
    ("bits_per_weight", 1),
    ("modules", 1),
    ("seconds", 1),
)


def write_batch_html(files: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `batch_page` to `path`, whole or not at all.

    Raises:
        SaveError: the file cannot be written.
    """
    write_page(batch_page(files, settings), path)


def batch_page(files: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """A page for the outcomes of a batch, as `batch.run_job` returns them."""
    made = [file for file in files if file["status"] in ("written", "copied")]
    before, after = (sum(file[side] for file in made) for side in ("bytes_in", "bytes_out"))
    counts = Counter(file["status"] for file in files)
    numbers = [
        (f"{len(files)}", "files", ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts.items())),
        (size_text(after), "size", f"was {size_text(before)}"),
        (f"{before / after:.1f}×" if after else "–", "smaller", "files written now"),
    ]
    headings = "".join(f'<th class="{kind}" aria-sort="none"><button>{name}</button></th>' for name, kind in _HEADINGS)
    table = (
        f'<section><h2>Files</h2><input type="search" placeholder="filter by name" aria-label="filter by name">'
        f'<div class="scroll"><table class="files"><thead><tr>{headings}</tr></thead>'
        f"<tbody>{''.join(map(_row, files))}</tbody></table></div></section>"
    )
    failed = [str(file["error"]) for file in files if file["status"] == "failed"]
    notes = [f"{file['input']}: {note}" for file in files for note in file.get("notes", ())]
    return page("batch", f"{len(files)} files", "", tiles(numbers) + table, [*failed, *notes], settings)


def _row(file: Mapping[str, Any]) -> str:
    cells = "".join(
        f'<td data-v="{file[name]:.6g}">{file[name] * scale:,.4g}</td>' if file.get(name) is not None else '<td data-v="-1">–</td>'
        for name, scale in _NUMBERS
    )
    return f"<tr><td>{as_html(file['input'])}</td><td>{as_html(file['status'].replace('_', ' '))}</td>{cells}</tr>"
