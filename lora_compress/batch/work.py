"""One file of a batch: skipped if it is done, compressed if not, and whatever goes wrong stays with this file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LoraCompressError
from ..report.file_report import FileReport
from .jobs import CompressOptions, Job
from .marker import MARKER_NAME, is_done, is_ours, make_marker, same_content
from .storage import at_hand, config_beside, copy_file, exists

__all__ = ["Compress", "run_job"]

Compress = Callable[..., FileReport]


def run_job(job: Job, options: CompressOptions, compress: Compress | None = None) -> dict[str, Any]:
    """Do one job and never raise.

    Args:
        compress: takes the place of `pipeline.compress_file`.

    Returns:
        input, output, status and notes; with the numbers of `FileReport.as_json` where the file was compressed, and `error` where
        it failed. status is written, not_smaller, copied, skipped (done before) or failed.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            outcome = _run(job, options, compress or _compress_file())
        except LoraCompressError as error:
            outcome = _outcome(job, "failed", error=str(error))
        except Exception as error:  # a batch outlives what it cannot foresee
            outcome = _outcome(job, "failed", error=f"{job.source}: {type(error).__name__}: {error}")
    outcome["notes"] = [*outcome.get("notes", ()), *dict.fromkeys(str(warning.message) for warning in caught)]
    return outcome


def _run(job: Job, options: CompressOptions, compress: Compress) -> dict[str, Any]:
    marker = make_marker(job.source, options)
    copy = str(Path(job.target).with_suffix(Path(job.source).suffix)) if "://" not in job.target else job.target
    whole = not job.adapter or exists(config_beside(job.target))
    done = whole and is_done(job.source, job.target, marker, options.writes_partner)
    if done or (whole and _is_copy(job.source, copy, options)):
        return _outcome(job, "skipped")
    if exists(job.target) and not options.force and not is_ours(job.target):
        raise LoraCompressError(f"{job.target}: exists and was not made by this program: move it away, or overwrite with --force")
    with at_hand(job.source, job.target) as (source, target):
        place = f"{os.path.dirname(target)}{os.sep}" if job.adapter else target
        report = compress(source, place, options.settings, details={MARKER_NAME: marker}, **options.keywords)
    outcome = {**report.as_json(), "input": job.source, "output": job.target if report.status == "written" else None}
    if report.status == "not_smaller" and options.copy_uncompressible:
        copy_file(job.source, copy)
        if job.adapter:
            copy_file(config_beside(job.source), config_beside(copy))
        outcome |= {"status": "copied", "output": copy, "bytes_out": outcome["bytes_in"]}
    return outcome


def _is_copy(source: str, target: str, options: CompressOptions) -> bool:
    return options.copy_uncompressible and exists(target) and same_content(source, target)


def _outcome(job: Job, status: str, **more: Any) -> dict[str, Any]:
    return {"input": job.source, "output": job.target if status == "skipped" else None, "status": status, **more}


def _compress_file() -> Compress:
    from ..engine.to_file import compress_file

    return compress_file
