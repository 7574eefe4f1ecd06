"""`resize_lora_ext.py --model IN --save_to OUT ...`: compress one file, or every file of a folder."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..batch import CompressOptions, is_batch
from ..batch.storage import at_hand, is_remote
from ..settings import CompressionSettings
from . import paths
from .arguments import (
    PRECISIONS,
    Parser,
    UsageError,
    add_program_flag,
    add_scale_flags,
    add_setting_flags,
    flag_settings,
    parse_settings,
    scale_options,
    section_values,
)
from .batch import run_batch
from .console import print_json, print_notes, print_report, progress, quiet_stdout
from .truncate import run_truncate

__all__ = ["read_options", "run"]

_EXAMPLES = """\
verbs:
  resize_lora_ext.py expand  --model PACKED --save_to OUT    a packed file as a plain one
  resize_lora_ext.py inspect --model FILE                    what a file holds, and what a smaller one would cost
  resize_lora_ext.py compare A B                             how far apart two files are
  resize_lora_ext.py check   --model FILE --for comfyui      which programs open a file
  resize_lora_ext.py evaluate --original A --model B --base_model M --dataset D    what the pictures of B lost
  resize_lora_ext.py run SCRIPT [ARGUMENTS]                  a script of another program, which then reads packed files
  resize_lora_ext.py gui                                     a page in the browser that makes a file smaller

examples:
  resize_lora_ext.py --model lora.safetensors --save_to small.safetensors --new_rank 16
  resize_lora_ext.py --model lora.safetensors --save_to small.safetensors --target_size 20MB --quantize strategy=entropy
  resize_lora_ext.py --model loras/ --save_to small/ --target_error 0.05 --format fp8
"""
_NOTHING_ASKED = """nothing is asked for: say what to do with the file, for example
  --new_rank 16                                       at most 16 components in every module, as sd-scripts' resize_lora.py
  --target_error 0.05                                 as small as it gets at 5 % error
  --target_size 20MB --quantize strategy=entropy      the best file of 20 MB, packed
(--help lists everything)"""
_PRECISION_HELP = (
    "precision of plain files; default that of the input, but with --target_size or --target_error fp16 instead of fp32, and bf16 "
    "where fp16 does not hold the weights"
)
_PLACES = {"min_rank", "quantization_device", "allow_larger"}  # ask for nothing by themselves


def run(argv: Sequence[str]) -> int:
    """Compress what the flags name; see `main` for the exit status."""
    args = _parser().parse(argv)
    options = read_options(args)
    if args.model and is_batch(args.model):
        return run_batch(args, options)
    if args.executor != "local":
        raise UsageError("--executor ray: spreads a batch: give a folder or a pattern as --model and a folder as --save_to")
    if args.truncate is not None:
        return run_truncate(args)
    source, target = _checked_paths(args, options.settings)
    with quiet_stdout() as warned, progress(os.path.basename(source)) as report_progress, at_hand(source, target) as (local, out):
        from ..engine.to_file import compress_file

        report = compress_file(local, out, options.settings, progress=report_progress, **options.keywords)
    report = replace(report, input=source, output=report.output and target)
    if args.report:
        from ..report.html import write_html

        write_html(report, args.report)
    if args.json:
        print_json({**report.as_json(), "notes": [*report.notes, *warned]})
    else:
        print_report(report, args.verbose)
        print_notes([*report.notes, *warned, *_ignored(args)])
    return 0


def read_options(args: argparse.Namespace) -> CompressOptions:
    """What the flags ask for.

    Raises:
        UsageError: nothing is asked for, a flag is given twice in two ways, or a file that is named is not there.
        SettingsError: settings that are wrong or contradict each other.
    """
    values = flag_settings(args)
    values |= section_values(args)
    asked = {*values} - _PLACES
    if not asked and args.truncate is None and not (args.save_precision or args.consumers or args.force_resize):
        raise UsageError(*_NOTHING_ASKED.splitlines())
    if args.truncate is not None and (asked or args.save_precision or args.consumers):
        raise UsageError(f"--truncate {args.truncate}: cuts a progressive file as it is: leave out every other setting")
    for flag in ("base_model", "calibration"):
        if getattr(args, flag) is not None:
            paths.check_input(getattr(args, flag), f"--{flag}")
    return CompressOptions(
        settings=parse_settings(values),
        save_dtype=PRECISIONS[args.save_precision] if args.save_precision else None,
        consumers=tuple(dict.fromkeys(args.consumers or ())),
        base_model=args.base_model,
        calibration=args.calibration,
        force=args.force,
        repair=args.force_resize,
        copy_uncompressible=args.copy_uncompressible,
        **scale_options(args),
    )


def _checked_paths(args: argparse.Namespace, settings: CompressionSettings) -> tuple[str, str]:
    source = paths.check_input(args.model, remote=True)
    if paths.is_adapter_output(args.save_to, source, args.peft_config, packed=settings.save_format in ("packed", "both")):
        paths.check_folder(Path(args.save_to), f"--save_to {args.save_to}")
        target = args.save_to
    else:
        target = paths.check_output(args.save_to, [source], force=args.force, remote=True)
    if settings.save_format == "both" and not is_remote(target):
        from ..engine.in_memory import kohya_partner

        paths.check_output(str(kohya_partner(target)), [source], force=args.force)
    if args.report:
        args.report = paths.check_output(args.report, flag="--report", suffix=".html")
    return source, target


def _ignored(args: argparse.Namespace) -> list[str]:
    if args.svd_lowrank_niter is None:
        return []
    return ["--svd_lowrank_niter has nothing to do here: the decomposition is exact, and as fast on any size"]


def _parser() -> Parser:
    parser = Parser(prog="resize_lora_ext.py", description="Compress finished LoRA files.", epilog=_EXAMPLES)
    group = parser.add_argument_group("input and output")
    group.add_argument("--model", "--src_model", metavar="IN", help="LoRA file, PEFT folder or URL; a folder or pattern for many")
    group.add_argument("--save_to", "--dst_model", metavar="OUT", help="file or URL (.safetensors); a folder for many or for PEFT")
    group.add_argument("--save_precision", choices=PRECISIONS, help=_PRECISION_HELP)
    add_program_flag(group, "keep to the rules of these programs")
    add_scale_flags(group)
    group.add_argument("--truncate", metavar="SIZE", help="cut a progressive packed file to this size, such as 8MB")
    group.add_argument("--force", action="store_true", help="allow OUT to be IN, and a batch to overwrite files of others")
    group.add_argument(
        "--force_resize",
        action="store_true",
        help="repair files whose alpha, rank or dimensions disagree, and say what was changed",
    )
    add_setting_flags(parser)
    group = parser.add_argument_group("what the choice is weighed by")
    group.add_argument("--base_model", metavar="FILE", help="checkpoint: errors count relative to its layers' norms")
    group.add_argument("--calibration", metavar="FILE", help="calibration file of this LoRA: errors count as its layers see them")
    group = parser.add_argument_group("many files")
    group.add_argument("--executor", choices=("local", "ray"), default="local", help="all cores of this machine, or a Ray cluster")
    group.add_argument("--copy_uncompressible", action="store_true", help="copy files that would not become smaller")
    group = parser.add_argument_group("what is told")
    group.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    group.add_argument("--report", metavar="F.html", help="write a page with spectra, ranks, bits and errors")
    group.add_argument("--verbose", action="store_true", help="a line for every module")
    group.add_argument("--svd_lowrank_niter", type=int, metavar="N", help="accepted for sd-scripts' sake: the SVD is always exact")
    return parser
