"""The page: a file field, what the file is, a choice of size, progress, downloads. Importing this needs Gradio."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ..errors import LoraCompressError
from ..inspection.file import inspect_file
from ..text import as_html
from .offers import PACKED, PLAIN, SizeRange, about, chart_rows, curves, size_range
from .work import check_upload, make, told_error

__all__ = ["LOOK", "build"]

_INTRODUCTION = """# LoRA Compress
Makes LoRA files smaller. Files stay on the machine that serves this page, and are removed after about an hour."""
_KINDS = f"""- **{PLAIN}**: a plain file, for every program that opens the original.
- **{PACKED}**: a packed file, much smaller at the same error. It needs our plug-in for ComfyUI, AUTOMATIC1111 or Forge, or
  `load_lora` with diffusers; for other programs `resize_lora_ext.py expand` makes it plain again."""
_X, _Y, _KIND = "size, MB", "relative error, %", "kind of file"
_KEPT = (600, 3600)  # every ten minutes, files that are an hour old are removed
_CSS = """.about, .about tr, .about th, .about td { border: 0 !important; padding: 0.15em 1.5em 0.15em 0 !important }
.about th { text-align: left; font-weight: 600; white-space: nowrap }
.about td { overflow-wrap: anywhere }"""
LOOK = {  # options of launch; the fonts are those of the system, others would be fetched from elsewhere
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": _CSS,
}


def build() -> Any:
    """The page as gr.Blocks, not yet served."""
    with gr.Blocks(title="LoRA Compress", analytics_enabled=False, delete_cache=_KEPT) as page:
        gr.Markdown(_INTRODUCTION)
        upload = gr.File(label="LoRA file (.safetensors)", file_types=[".safetensors"], elem_id="upload")
        ranges = gr.State({})
        with gr.Column(visible=False) as choice:
            description = gr.HTML(elem_id="about")
            chart = gr.LinePlot(x=_X, y=_Y, color=_KIND, title="what each size loses", height=280, elem_id="chart")
            kind = gr.Radio([PLAIN, PACKED], value=PLAIN, label="What to make", elem_id="kind")
            gr.Markdown(_KINDS)
            size = gr.Slider(label="Size at most, MB", elem_id="size")
            button = gr.Button("Compress", variant="primary", elem_id="compress")
        with gr.Column(visible=False) as result:
            sentence = gr.Markdown(elem_id="result", min_height=80)
            file = gr.DownloadButton("Download the file", variant="primary", elem_id="file")
            report = gr.DownloadButton("Download the report", elem_id="report")
        seen = [choice, description, chart, kind, size, ranges, result]
        shown = [result, sentence, file, report]
        upload.upload(_look, upload, seen)
        upload.clear(_nothing, None, seen)
        kind.change(_slider, [kind, ranges], size)
        begun = button.click(_begin, None, shown)  # progress can be seen on what is visible only
        begun.then(_compress, [upload, kind, size], shown, concurrency_limit=1, show_progress_on=sentence)
    return page


def _nothing() -> tuple[Any, ...]:
    return gr.update(visible=False), "", None, PLAIN, gr.update(), {}, gr.update(visible=False)


def _look(path: str) -> Iterator[tuple[Any, ...]]:
    """What the page shows of an upload; what it showed before goes first, so that it does not stand beside an error."""
    yield _nothing()
    try:
        check_upload(path)
        found = inspect_file(path)
    except LoraCompressError as error:
        raise _shown(error, path) from None
    by_kind = curves(found)
    ranges = {name: size_range(curve, found.bytes) for name, curve in by_kind.items()}
    table = pd.DataFrame(chart_rows(by_kind, found.bytes), columns=[_X, _Y, _KIND])
    yield gr.update(visible=True), about(found), table, PLAIN, _slider(PLAIN, ranges), ranges, gr.update(visible=False)


def _slider(kind: str, ranges: dict[str, SizeRange]) -> Any:
    if kind not in ranges:
        return gr.update()
    found = ranges[kind]
    return gr.update(minimum=found.smallest, maximum=found.largest, value=found.usual, step=found.step)


def _begin() -> tuple[Any, ...]:
    hidden = gr.update(value=None, visible=False)
    return gr.update(visible=True), "", hidden, hidden


def _compress(path: str | None, kind: str, size: float, progress: Any = gr.Progress()) -> Iterator[tuple[Any, ...]]:  # noqa: B008
    """Gradio copies what is yielded; the folder with the originals goes before this ends."""
    if not path:
        raise gr.Error("There is no file: choose one first.", print_exception=False)
    with tempfile.TemporaryDirectory(prefix="lora-compress-") as folder:
        progress(0.0, desc="choosing what to keep")
        try:
            made = make(path, kind, size, Path(folder), _teller(progress))
        except LoraCompressError as error:
            raise _shown(error, path, Path(folder)) from None
        downloads = (gr.update(value=str(p) if p else None, visible=p is not None) for p in (made.file, made.report))
        yield gr.update(visible=True), made.sentence, *downloads


def _teller(progress: Any) -> Callable[[int, int], None]:
    """Progress by modules; a search for a size passes over them several times."""
    passes = 0

    def tell(done: int, total: int) -> None:
        nonlocal passes
        passes += done == 1
        progress((done, total), desc=f"pass {passes} over the modules", unit="modules")

    return tell


def _shown(error: LoraCompressError, path: str, folder: Path | None = None) -> gr.Error:
    return gr.Error(as_html(told_error(error, path, folder)), duration=None, print_exception=False)
