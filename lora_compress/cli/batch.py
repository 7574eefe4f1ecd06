"""A folder or a pattern as --model: run the batch, show how far it is, list what failed."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.table import Table

from ..batch import CompressOptions, Job, plan_jobs, run_local, run_on_ray
from ..batch.storage import is_remote
from . import paths
from .arguments import UsageError
from .console import cell, megabytes, print_json, print_notes, progress, quiet_stdout, show

__all__ = ["run_batch"]


def run_batch(args: argparse.Namespace, options: CompressOptions) -> int:
    """Compress every file that --model names; 1 if any failed."""
    jobs = _plan(args, options)
    run = run_on_ray if args.executor == "ray" else run_local
    outcomes = {}
    with quiet_stdout() as warned, progress("compressing", "file") as report_progress, closing(run(jobs, options)) as done:
        report_progress(0, len(jobs))
        for outcome in done:
            outcomes[outcome["input"]] = outcome
            report_progress(len(outcomes), len(jobs))
    files = [outcomes[place] for place in sorted(outcomes)]
    if args.report:
        from ..report.html_batch import write_batch_html

        write_batch_html(files, options.settings.as_dict(), args.report)
    if args.json:
        print_json({"files": files, **summary(files)})
    else:
        show(_table(files), *_closing(files))
        print_notes([f"{file['input']}: {note}" for file in files for note in file.get("notes", ())] + warned)
    return 1 if any(file["status"] == "failed" for file in files) else 0


def summary(files: list[dict[str, Any]]) -> dict[str, int]:
    """How many files ended in each way, and the bytes of those that were written now, before and after."""
    counts = Counter(file["status"] for file in files)
    statuses = ("written", "copied", "not_smaller", "skipped", "failed")
    made = [file for file in files if file["status"] in ("written", "copied")]
    sizes = {side: sum(file[side] for file in made) for side in ("bytes_in", "bytes_out")}
    return {status: counts[status] for status in statuses} | sizes


def _plan(args: argparse.Namespace, options: CompressOptions) -> list[Job]:
    if args.truncate is not None:
        raise UsageError(f"--truncate {args.truncate}: cuts one file: name a file as --model")
    if not args.save_to:
        raise UsageError("--save_to: is missing: with many inputs name a folder, --save_to small/")
    if not is_remote(args.save_to):
        if os.path.isfile(args.save_to) or (paths.names_a_file(args.save_to) and not os.path.isdir(args.save_to)):
            raise UsageError(f"--save_to {args.save_to}: is a file, and --model names many: name a folder, --save_to small/")
        paths.check_folder(Path(args.save_to), f"--save_to {args.save_to}")
    if args.report:
        args.report = paths.check_output(args.report, flag="--report", suffix=".html")
    packed = options.settings.save_format in ("packed", "both")
    return plan_jobs(args.model, args.save_to, options.force, options.writes_partner, adapters=not packed)


def _table(files: list[dict[str, Any]]) -> Table:
    table = Table("file", "status", title="batch")
    for heading in ("size", "relative error", "bits per weight"):
        table.add_column(heading, justify="right")
    for file, name in zip(files, _short_names([file["input"] for file in files]), strict=True):
        if "bytes_in" in file:
            size = f"{megabytes(file['bytes_in'])} -> {megabytes(file['bytes_out'])}"
            written = file["status"] == "written"
            numbers = (size, *((f"{file['relative_error']:.2%}", f"{file['bits_per_weight']:.2f}") if written else ("-", "-")))
        else:
            numbers = ("-", "-", "-")
        table.add_row(cell(name), file["status"], *numbers)
    return table


def _short_names(places: list[str]) -> list[str]:
    """Paths or URLs without the folders that all share."""
    parts = [place.replace(os.sep, "/").split("/") for place in places]
    shared = 0
    while all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return ["/".join(each[shared:]) for each in parts]


def _closing(files: list[dict[str, Any]]) -> list[str]:
    counts = summary(files)
    lines = [
        ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts.items() if count and "bytes" not in status)
    ]
    if counts["bytes_in"]:
        lines[0] += f"; {megabytes(counts['bytes_in'])} -> {megabytes(counts['bytes_out'])}"
    return lines + [f"failed: {file['error']}" for file in files if file["status"] == "failed"]
