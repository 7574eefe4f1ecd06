"""A page about an evaluation: its numbers with their intervals, the error over timesteps, and the pictures side by side.

With them on the page: what became of the file that the LoRA was made from, and the evaluations of its training.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..evaluation.results import Estimate, Evaluation
from ..evaluation.validation import read_history
from ..inspection.file import report_files
from ..text import as_html
from .charts import size_text
from .file_report import FileReport
from .html import file_body, page, tiles, write_page
from .html_history import history_body, history_notes

__all__ = ["evaluation_page", "write_evaluation_html"]

_GAIN = 4  # of differences, which are too faint to be seen
_SIDE = 256  # pixels that a picture is shown with at most
_HEADINGS = ("metric", "value", "95 % interval", "floor", "N", "measured by", "what")


def write_evaluation_html(found: Evaluation, path: str | os.PathLike[str]) -> None:
    """Write `evaluation_page` to `path`, whole or not at all, with all that is known of the LoRA.

    The original's file is compared with the LoRA's; the history of its training is taken from <name>.evaluations.jsonl beside it.

    Raises:
        FormatError: what lies there is no history.
        SaveError: the file cannot be written.
    """
    file = None if found.original is None else report_files(found.original, found.path)
    history = read_history(Path(found.path).with_suffix(".evaluations.jsonl"))
    write_page(evaluation_page(found, file, history), path)


def evaluation_page(found: Evaluation, file: FileReport | None = None, history: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page, with nothing in it that comes from elsewhere.

    Args:
        found: what was measured.
        file: what became of the original's file.
        history: of the training, as `html_history.history_page` takes it.
    """
    body = tiles(_headline(found)) + _table(found) + _pictures(found) + _timesteps(found)
    body += "" if file is None else f"<h2>The file</h2>{file_body(file)}"
    body += f"<h2>The training</h2>{history_body(history)}" if history else ""
    notes = [*found.notes, *(file.notes if file is not None else ()), *history_notes(history)]
    lead = as_html(found.path) if found.original is None else f"{as_html(found.original)} &rarr; {as_html(found.path)}"
    return page(os.path.basename(found.path), lead, "evaluation", body, notes, found.settings)


def _headline(found: Evaluation) -> list[tuple[str, str, str]]:
    was = "" if found.bytes_original is None else f"was {size_text(found.bytes_original)}"
    numbers = [(size_text(found.bytes), "size", was)]
    if found.relative_error is not None:
        numbers.append((f"{found.relative_error:.2%}", "relative error", "of the weights"))
    shown = [estimate for estimate in found.estimates if not estimate.name.endswith(("_base", "_full", "_other_seed"))]
    return numbers + [(_number(e.value), e.name, "" if e.floor is None else f"floor {_number(e.floor)}") for e in shown]


def _table(found: Evaluation) -> str:
    if not found.estimates:
        return ""
    headings = "".join(f"<th>{heading}</th>" for heading in _HEADINGS)
    rows = "".join(map(_row, found.estimates))
    return (
        '<section><h2>Measures</h2><div class="scroll-x"><table class="measures">'
        f"<thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(estimate: Estimate) -> str:
    low, high = estimate.interval
    cells = (
        estimate.name,
        _number(estimate.value),
        f"{_number(low)} to {_number(high)}" if math.isfinite(low) else "too few",
        "–" if estimate.floor is None else _number(estimate.floor),
        str(estimate.count) if estimate.against is None else f"{estimate.count} / {estimate.against}",
        estimate.extractor,
        estimate.meaning,
    )
    return f"<tr>{''.join(f'<td>{as_html(cell)}</td>' for cell in cells)}</tr>"


def _timesteps(found: Evaluation) -> str:
    if not found.by_timestep:
        return ""
    cells = "".join(f"<tr><td>{time:g}</td><td>{value:.4f}</td></tr>" for time, value in found.by_timestep)
    table = f'<table class="measures"><thead><tr><th>timestep</th><th>error</th></tr></thead><tbody>{cells}</tbody></table>'
    return f'<section><h2>Relative output error by timestep</h2><div class="scroll-x">{table}</div></section>'


def _pictures(found: Evaluation) -> str:
    """A row for each prompt: what drew it, and the difference of the last two, made stronger."""
    if not found.pictures:
        return ""
    columns = dict(found.pictures)
    before, after = list(columns.values())[-2:]
    left, right = list(columns)[-2:]
    columns[f"difference × {_GAIN}"] = (after.int() - before.int()).abs().mul(_GAIN).clamp(0, 255).byte()
    headings = "".join(f"<th>{as_html(name)}</th>" for name in columns)
    rows = "".join(
        "<tr>"
        + "".join(f'<td><img alt="{as_html(name)}" src="{_source(side[i])}"></td>' for name, side in columns.items())
        + "</tr>"
        for i in range(len(before))
    )
    table = f'<table class="pictures"><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>'
    hint = '<span class="unit">left and right of the slider; click a row for other pictures</span>'
    viewer = (  # filled by the script, with pictures of the table
        f'<figure id="compare" hidden><figcaption>{as_html(left)} and {as_html(right)} {hint}</figcaption>'
        '<div class="stack"><img alt=""><img alt=""></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="where {as_html(right)} begins"></figure>'
    )
    return f'<section><h2>Pictures of the same prompt and noise</h2>{viewer}<div class="scroll-x">{table}</div></section>'


def _source(picture: Tensor) -> str:
    """A picture (3, H, W) as a data URI."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _number(value: float) -> str:
    return f"{value:.4g}"
