"""`--truncate SIZE`: cut a progressive packed file, which is its header rewritten and its end left out."""

from __future__ import annotations

import argparse

from ..settings.budget import parse_size
from . import paths
from .arguments import UsageError
from .console import print_json, print_notes, print_report, quiet_stdout

__all__ = ["run_truncate"]


def run_truncate(args: argparse.Namespace) -> int:
    """Write a prefix of --model to --save_to."""
    try:
        size = parse_size(args.truncate)
    except ValueError as error:
        raise UsageError(f"--truncate {args.truncate}: {error}") from None
    source = paths.check_input(args.model)
    target = paths.check_output(args.save_to, [source], force=args.force)
    with quiet_stdout() as warned:
        from ..engine.unpack import truncate_file

        report = truncate_file(source, target, size, force=args.force)
    if args.report:
        from ..report.html import write_html

        write_html(report, args.report)
    if args.json:
        print_json({**report.as_json(), "notes": [*report.notes, *warned]})
    else:
        print_report(report, args.verbose)
        print_notes([*report.notes, *warned])
    return 0
