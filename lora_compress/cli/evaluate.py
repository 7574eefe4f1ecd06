"""`resize_lora_ext.py evaluate [--original A] --model B --base_model M --dataset D`: what a LoRA's pictures are worth."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from tqdm import tqdm

from ..evaluation.results import Estimate, Evaluation
from . import paths
from .arguments import PRECISIONS, Parser, UsageError
from .console import cell, megabytes, print_json, print_notes, quiet_stdout, show

__all__ = ["run"]

_EXTRACTORS = ("inception", "clip", "dinov2", "probe")
_EXAMPLES = """\
examples:
  resize_lora_ext.py evaluate --original lora.safetensors --model small.safetensors --base_model sd15/ --dataset photos/
  resize_lora_ext.py evaluate --original lora.safetensors --model small.safetensors --base_model sd15/     same prompts, no data set
  resize_lora_ext.py evaluate --model small.safetensors --base_model sd15/ --dataset photos/ --extractor clip inception

The data set is a folder of pictures with a caption each (a.png, a.txt); its captions are the prompts.
"""


def run(argv: Sequence[str]) -> int:
    """Evaluate what the flags name; see `main` for the exit status."""
    args = _parser().parse(argv)
    model, original = _files(args)
    for flag in ("dataset", "prompts"):
        if getattr(args, flag) is not None:
            paths.check_input(getattr(args, flag), f"--{flag}")
    if args.dataset is not None and args.base_model is None:
        raise UsageError(f"--dataset {args.dataset}: pictures are compared with drawn ones: name the model, --base_model FOLDER")
    if args.report:
        args.report = paths.check_output(args.report, flag="--report", suffix=".html")
    weights = _weights(args.weights)
    with quiet_stdout() as warned, _Bars() as bars:
        from ..evaluation.performance import evaluate_lora_performance

        found = evaluate_lora_performance(
            model,
            args.dataset,
            base_model=args.base_model,
            original=original,
            prompts=args.prompts,
            progress=bars.report,
            extractors=tuple(args.extractor or ()),
            weights=weights,
            **_options(args),
        )
    if args.report:
        from ..report.html_evaluation import write_evaluation_html

        write_evaluation_html(found, args.report)
    if args.json:
        print_json({**found.as_json(), "notes": [*found.notes, *warned]})
    else:
        show(_head(found), *([_table(found)] if found.estimates else []))
        print_notes([*found.notes, *warned])
    return 0


def _files(args: argparse.Namespace) -> tuple[str, str | None]:
    """Return the file to evaluate, and the one that it was made from. The older spelling is --model ORIGINAL --other FILE.

    Raises:
        UsageError: both spellings at once.
    """
    if args.other is None:
        original = None if args.original is None else paths.check_input(args.original, "--original")
        return paths.check_input(args.model), original
    if args.original is not None:
        raise UsageError("--other: is the older name of the file to evaluate: give --original A --model B")
    return paths.check_input(args.other, "--other"), paths.check_input(args.model)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("count", "seed", "steps", "guidance", "resolution", "batch", "device")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.precision:
        options["dtype"] = PRECISIONS[args.precision]
    if args.cache is not None:
        options["cache"] = False if args.cache == "none" else args.cache
    return options


def _weights(words: Sequence[str] | None) -> dict[str, str]:
    found = {}
    for word in words or ():
        name, equals, place = word.partition("=")
        if name not in _EXTRACTORS or not equals or not place:
            raise UsageError(f"--weights {word}: must be NAME=PATH with NAME one of {', '.join(_EXTRACTORS)}")
        found[name] = place
    return found


def _head(found: Evaluation) -> str:
    size = f"{found.path}: {megabytes(found.bytes)}"
    if found.original is None or found.bytes_original is None:
        return size
    error = "" if found.relative_error is None else f", relative error of the weights {found.relative_error:.2%}"
    return f"{size}, made from {found.original}: {megabytes(found.bytes_original)}{error}"


def _table(found: Evaluation) -> Table:
    table = Table(title=cell(f"{found.path} on {found.settings.get('base_model', '')}"))
    table.add_column("metric", overflow="fold")
    for heading in ("value", "95 % interval", "floor", "N"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("by")
    table.add_column("what")
    for estimate in found.estimates:
        low, high = estimate.interval
        table.add_row(
            cell(estimate.name),
            _number(estimate.value),
            f"{_number(low)} to {_number(high)}" if math.isfinite(low) else "too few",
            "-" if estimate.floor is None else _number(estimate.floor),
            _count(estimate),
            cell(estimate.extractor),
            cell(estimate.meaning),
        )
    return table


def _count(estimate: Estimate) -> str:
    return str(estimate.count) if estimate.against is None else f"{estimate.count} / {estimate.against}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


class _Bars:
    """A progress bar for each thing that is drawn, one after the other, on stderr where that is a terminal."""

    def __init__(self) -> None:
        self._title: str | None = None
        self._bar: Any = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def report(self, title: str, done: int, total: int) -> None:
        """Show that `done` of `total` pictures are drawn."""
        if title != self._title:
            self.__exit__()
            self._title = title
            self._bar = tqdm(
                total=total, desc=title, unit="picture", file=sys.stderr, leave=False, disable=None, dynamic_ncols=True
            )
        self._bar.update(done - self._bar.n)


def _parser() -> Parser:
    parser = Parser(
        prog="resize_lora_ext.py evaluate",
        description="Draw with a LoRA and measure the pictures; docs/evaluation.md says which number to trust when.",
        epilog=_EXAMPLES,
    )
    group = parser.add_argument_group("what is evaluated")
    group.add_argument("--model", metavar="B", help="the LoRA, packed or plain, of any layout")
    group.add_argument("--original", metavar="A", help="the LoRA that B was made from, to compare their pictures")
    group.add_argument("--other", metavar="B", help="the older spelling: --model A --other B")
    group.add_argument(
        "--base_model", metavar="M", help="diffusers folder, checkpoint or name on the Hugging Face hub; to draw with"
    )
    group.add_argument("--dataset", metavar="D", help="folder of real pictures with captions")
    group.add_argument("--prompts", metavar="FILE", help="one prompt a line, instead of captions or stock prompts")
    group = parser.add_argument_group("how pictures are drawn")
    group.add_argument("--count", type=int, metavar="N", help="pictures of each model; default 64")
    group.add_argument("--seed", type=int, metavar="N", help="of the first picture; default 0")
    group.add_argument("--steps", type=int, metavar="N", help="of the sampler; default 25")
    group.add_argument("--guidance", type=float, metavar="X", help="guidance scale; default the pipeline's")
    group.add_argument("--resolution", type=int, metavar="N", help="of drawn pictures, and real ones are scaled and cropped to it")
    group.add_argument("--batch", type=int, metavar="N", help="pictures at a time; default 8")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1; default cpu")
    group.add_argument("--precision", choices=PRECISIONS, help="of the base model; default float")
    group = parser.add_argument_group("how they are measured")
    group.add_argument("--extractor", nargs="+", choices=_EXTRACTORS, help="of features; default inception, whose distance is FID")
    group.add_argument("--weights", nargs="+", metavar="NAME=PATH", help="an extractor's weights: a file or folder")
    group.add_argument(
        "--cache", metavar="FOLDER", help="where features of data sets are kept, or none; default ~/.cache/lora-compress"
    )
    group = parser.add_argument_group("what is told")
    group.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    group.add_argument("--report", metavar="F.html", help="write a page with the numbers and pictures")
    return parser
