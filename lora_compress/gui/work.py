"""One run of the page: an uploaded file to a smaller one and its report, told in a sentence."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..cli.console import megabytes
from ..engine.to_file import compress_file
from ..errors import FormatError, LoraCompressError
from ..report.file_report import FileReport
from ..report.html import write_html
from ..settings import CompressionSettings
from .offers import PACKED, SETTINGS

__all__ = ["CLOSING", "WORKING", "Made", "check_upload", "make", "told_error"]

CLOSING = threading.Event()  # set when the page ends: what is under way stops at its next module
WORKING = threading.Lock()  # held while a file is made


@dataclass(frozen=True)
class Made:
    """What came of it: a sentence, and the files, None where nothing was written."""

    sentence: str
    file: Path | None = None
    report: Path | None = None


def check_upload(path: str) -> None:
    """Check that an upload is there and has the right ending.

    Raises:
        FormatError: it has not, or was removed because it lay too long.
    """
    if not path.lower().endswith(".safetensors"):
        raise FormatError(f"{path}: is no .safetensors file: choose a LoRA file that ends with .safetensors")
    if not os.path.isfile(path):
        raise FormatError(f"{path}: was removed, files are kept for an hour: upload it again")


def make(path: str, kind: str, megabytes_asked: float, folder: Path, progress: Callable[[int, int], None]) -> Made:
    """Compress the upload at `path` into `folder`.

    Args:
        kind: a key of `offers.SETTINGS`.
        megabytes_asked: bytes of the written file at most, in millions.
        progress: called with (modules done, modules in all).

    Raises:
        LoraCompressError: as compress_file; see `told_error` for the words.
    """
    check_upload(path)
    name = Path(path).name
    target = folder / f"{Path(path).stem}-{'packed' if kind == PACKED else 'small'}.safetensors"
    settings = CompressionSettings.parse({**SETTINGS[kind], "target_size": str(int(megabytes_asked * 1e6))})
    with WORKING:
        report = compress_file(path, target, settings, progress=_until_closing(progress))
    before, after = map(megabytes, report.bytes)
    if report.output is None:
        return Made(f"Nothing was written: the result would take {after}, the file itself takes {before}. Choose a smaller size.")
    page = folder / f"{Path(path).stem}-report.html"
    write_html(_without_folders(report, name, target), page)
    return Made(f"{before} became {after}, with a relative error of {report.relative_error:.2%}.", target, page)


def _until_closing(progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if CLOSING.is_set():
            raise LoraCompressError("the page is being closed")
        progress(done, total)

    return report


def told_error(error: LoraCompressError, path: str, folder: Path | None = None) -> str:
    """The message with the names of files instead of the temporary paths that they have here."""
    text = str(error).replace(path, os.path.basename(path))
    return text.replace(f"{folder}{os.sep}", "") if folder else text


def _without_folders(report: FileReport, name: str, target: Path) -> FileReport:
    notes = tuple(note.replace(report.input, name) for note in report.notes)
    return replace(report, input=name, output=target.name, notes=notes)
