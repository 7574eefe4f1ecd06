"""`resize_lora_ext.py expand --model PACKED --save_to OUT`: a packed file as a plain one that every program loads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from . import paths
from .arguments import PRECISIONS, Parser
from .console import print_json, print_notes, print_report, quiet_stdout

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Expand what the flags name; see `main` for the exit status."""
    parser = Parser(prog="resize_lora_ext.py expand", description="Write a packed LoRA as a plain file.")
    parser.add_argument("--model", "--src_model", metavar="PACKED", help="packed file to read")
    parser.add_argument("--save_to", "--dst_model", metavar="OUT", help="file to write (.safetensors), or a folder for PEFT")
    parser.add_argument("--peft_config", metavar="FILE", help="adapter_config.json for a folder, where PACKED remembers none")
    parser.add_argument("--save_precision", choices=PRECISIONS, help="precision of the plain file; default that before packing")
    parser.add_argument("--force", action="store_true", help="allow OUT to be the packed file itself")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    parser.add_argument("--verbose", action="store_true", help="a line for every module")
    args = parser.parse(argv)
    source = paths.check_input(args.model)
    if paths.is_adapter_output(args.save_to, source, args.peft_config):
        target = args.save_to
        paths.check_folder(Path(target), f"--save_to {target}")
    else:
        target = paths.check_output(args.save_to, [source], force=args.force)
    dtype = PRECISIONS[args.save_precision] if args.save_precision else None
    stated = {"peft_config": args.peft_config} if args.peft_config else {}
    with quiet_stdout() as warned:
        from ..engine.unpack import expand_file

        report = expand_file(source, target, save_dtype=dtype, force=args.force, **stated)
    if args.json:
        print_json({**report.as_json(), "notes": [*report.notes, *warned]})
    else:
        print_report(report, args.verbose)
        print_notes([*report.notes, *warned, f"{os.path.basename(target)} opens in every program that loads LoRA files"])
    return 0
