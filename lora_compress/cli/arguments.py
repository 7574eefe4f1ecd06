"""Flags: those that all verbs share, a flag for every setting, and a parser whose errors are one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, get_type_hints

import torch

from ..errors import LoraCompressError, SettingsError
from ..layouts.peft_config import CONFIG_NAME
from ..programs.table import CONSUMERS
from ..settings import SECTIONS, CompressionSettings, QatSettings, QuantizationSettings, TrainingSettings, setting_names
from .process import written

__all__ = [
    "PRECISIONS",
    "Parser",
    "UsageError",
    "add_program_flag",
    "add_scale_flags",
    "add_setting_flags",
    "flag_settings",
    "parse_settings",
    "quantize_pairs",
    "scale_options",
    "section_values",
]

PRECISIONS = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_QUANTIZE = {field.name for field in dataclasses.fields(QuantizationSettings)}
_TRAINING = {field.name for part in (TrainingSettings, QatSettings) for field in dataclasses.fields(part)}  # no file learns
_ALIASES = {"save_format": ("--format", "--save_format"), "quantization_device": ("--device", "--quantization_device")}
# What a training script calls what a finished file gets by another flag.
_TRAINER_FLAGS = {
    "network_dim": "--new_rank",
    "network_rank": "--new_rank",
    "conv_dim": "--new_conv_rank",
    "network_weights": "--model",
    "input": "--model",
    "output": "--save_to",
    "output_name": "--save_to",
    "output_dir": "--save_to",
    "mixed_precision": "--save_precision",
    "save_dtype": "--save_precision",
    "network_args": "--pruning or --quantization",
}
_TRAINER_ALONE = ("evaluation", "adaptive", "config", "config_file", "network_module", "network_alpha", "model_type")
_METAVARS = {float: "X", int: "N", str: "TEXT", bool: "true|false"}


class UsageError(LoraCompressError):
    """The command line is wrong: which flag, what was found, what is allowed, what to do; more arguments are further lines."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class Parser(argparse.ArgumentParser):
    """Takes whole flag names only and raises `UsageError` instead of leaving the process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument ") + " (--help lists every flag)")

    def print_help(self, file: Any = None) -> None:
        """Show what --help tells; argparse itself would keep silent where it cannot be written."""
        with written():
            (file or sys.stdout).write(self.format_help())

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`.

        Raises:
            UsageError: an unknown flag, with the closest known one; a stray word; a missing or wrong value.
        """
        args, rest = self.parse_known_args(list(argv))
        if rest:
            raise UsageError(self._refuse(rest[0]))
        return args

    def _refuse(self, word: str) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"{word}: belongs to no flag: files are given as --model IN --save_to OUT, and paths with spaces in quotes"
        name = flag.lstrip("-").replace("-", "_").lower()
        known = {option.lstrip("-"): option for action in self._actions for option in action.option_strings}
        if name in known:  # only its hyphens or capitals differ
            return f"{flag}: unknown flag, did you mean {known[name]}?"
        if "quantize" in known and (told := _trainer_flag(name)):
            return f"{flag}: {told}"
        close = difflib.get_close_matches(name, known, n=1)
        return f"{flag}: unknown flag" + (f", did you mean {known[close[0]]}?" if close else ": --help lists every flag")


def _trainer_flag(name: str) -> str:
    """What to give instead of a flag of the training script; "" if it has no such flag."""
    if name in _QUANTIZE:
        return f"is a part of --quantize: write --quantize {name}=..."
    if name in _TRAINING:
        return "is a setting of trainings: give it to train_network_ext.py, a finished file does not learn"
    if name in _TRAINER_FLAGS:
        return f"is a flag of training scripts, did you mean {_TRAINER_FLAGS[name]}?"
    return "is a flag of train_network_ext.py alone: leave it out" if name in _TRAINER_ALONE else ""


def add_program_flag(parser: argparse._ActionsContainer, purpose: str) -> None:
    """Add `--for`, which takes names of programs, apart or separated by commas; the namespace gets them as `consumers`."""
    programs = (*CONSUMERS, "all")
    parser.add_argument(
        "--for",
        dest="consumers",
        nargs="+",
        type=_program_names,
        action=_Joined,
        metavar="PROGRAM",
        help=f"{purpose}: {', '.join(programs)}",
    )


class _Joined(argparse.Action):
    """Collects lists into one, over all words of a flag and all its uses."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        given = getattr(namespace, self.dest, None) or []
        setattr(namespace, self.dest, [*given, *(name for names in values for name in names)])


def _program_names(word: str) -> list[str]:
    """`comfyui,diffusers` as names of programs.

    Raises:
        argparse.ArgumentTypeError: one of them is not known.
    """
    names = [name.strip() for name in word.split(",") if name.strip()]
    for name in names:
        if name not in CONSUMERS and name != "all":
            close = difflib.get_close_matches(name.lower(), [*CONSUMERS, "all"], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r}: {hint}known are {', '.join((*CONSUMERS, 'all'))}")
    return names


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting but those of quantization, which are the names that --quantize takes.

    --pruning and --quantization, the flags of the training script, take the settings that they take there.
    """
    group = parser.add_argument_group("what to keep and how to store it (any of these can be combined)")
    for name, kind in setting_names().items():
        if name in _QUANTIZE or name in _TRAINING:
            continue
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        group.add_argument(*_ALIASES.get(name, (f"--{name}",)), dest=name, metavar=_METAVARS[kind], help=_HELPS.get(name), **switch)
    pairs: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "NAME=VALUE"}
    group.add_argument("--quantize", "--quantization", dest="quantize", help=_quantize_help(), **pairs)
    group.add_argument("--pruning", help="the flags above in the spelling of trainings: rank_ratio=0.5 min_rank=4 ...", **pairs)


def add_scale_flags(group: argparse._ActionsContainer) -> None:
    """What a file may need to be told whose strength it does not hold itself."""
    group.add_argument(
        "--alpha", type=float, metavar="X", help="alpha of modules whose file does not tell it, where it is not their rank"
    )
    group.add_argument(
        "--peft_config", metavar="FILE", help="adapter_config.json of a PEFT file, where it does not lie beside it; or its folder"
    )


def scale_options(args: argparse.Namespace) -> dict[str, Any]:
    """What these flags say, as `open_lora` takes it.

    Raises:
        UsageError: alpha scales nothing, or there is no such configuration.
    """
    if args.alpha is not None and not (math.isfinite(args.alpha) and args.alpha):
        raise UsageError(f"--alpha {args.alpha:g}: must be a number other than 0")
    if args.peft_config is not None and not os.path.exists(args.peft_config):
        raise UsageError(f"--peft_config {args.peft_config}: no such file: name the adapter_config.json of the weights")
    config = args.peft_config
    return {"alpha": args.alpha, "peft_config": os.path.join(config, CONFIG_NAME) if config and os.path.isdir(config) else config}


def flag_settings(args: argparse.Namespace) -> dict[str, str]:
    """The settings given as flags, as text by name."""
    return {name: getattr(args, name) for name in setting_names() if getattr(args, name, None) is not None}


def section_values(args: argparse.Namespace) -> dict[str, str]:
    """The settings given to --quantize (or --quantization) and --pruning, as text by name.

    `enabled=false` leaves out the others of its flag, as it does for the training script.

    Raises:
        UsageError: a word is not NAME=VALUE, the flag does not take this name, or a setting is given in two ways that differ.
    """
    found: dict[str, str] = {}
    for flag, values in {"--pruning": _pairs(args.pruning, "pruning"), "--quantize": quantize_pairs(args.quantize)}.items():
        enabled = values.pop("enabled", "true").lower()
        if enabled not in ("true", "false"):
            raise UsageError(f"{flag} enabled={enabled}: must be true or false")
        found |= values if enabled == "true" else {}
    for name, value in found.items():
        given = getattr(args, name, None)
        if given is not None and given != value:
            own = _ALIASES.get(name, (f"--{name}",))[0]
            raise UsageError(f"{own} {given}: {name}={value} is given too: give {name} once")
    return found


def quantize_pairs(words: Iterable[str] | None) -> dict[str, str]:
    """`bits=4 strategy=nf4` as {name: text}.

    Raises:
        UsageError: a word without =, or a name that --quantize does not take.
    """
    return _pairs(words, "quantization", "--quantize")


def _pairs(words: Iterable[str] | None, section: str, flag: str = "--pruning") -> dict[str, str]:
    known = sorted({*SECTIONS[section], "enabled"} - _TRAINING)
    pairs = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"{flag} {word}: must be NAME=VALUE with NAME one of {', '.join(known)}")
        if name not in known:
            raise UsageError(f"{flag} {word}: {name} is no part of {flag}{_hint(name, value, known)}")
        pairs[name] = value
    return pairs


def _hint(name: str, value: str, known: Sequence[str]) -> str:
    """Where a setting belongs that a section does not take, or which one may be meant."""
    if name in _TRAINING:
        return ": it is a setting of trainings, for train_network_ext.py"
    if name in _QUANTIZE:
        return f": it belongs to --quantize {name}={value}"
    if name in setting_names():
        return f": it is a flag of its own, --{name} {value}"
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f", did you mean {close[0]}?" if close else f": it takes {', '.join(known)}"


def parse_settings(values: dict[str, str]) -> CompressionSettings:
    """Settings from text by name.

    Raises:
        SettingsError: what is wrong, each by the flag that it was given with.
    """
    try:
        return CompressionSettings.parse(values)
    except SettingsError as error:
        raise SettingsError([_by_flag(problem) for problem in error.problems], "wrong settings") from None


def _by_flag(problem: str) -> str:
    """`rank_ratio=2: must ...` as `--rank_ratio 2: must ...`."""
    subject, colon, rest = problem.partition(":")
    name, equals, value = subject.partition("=")
    if not equals or name not in setting_names():
        return problem
    if name in _QUANTIZE:
        return f"--quantize {problem}"
    return f"{_ALIASES.get(name, (f'--{name}',))[0]} {value}{colon}{rest}"


def _quantize_help() -> str:
    parts = (f"{field.name}: {field.metadata.get('help', '')}" for field in dataclasses.fields(QuantizationSettings))
    return ("how weights are stored; " + "; ".join(parts)).replace("%", "%%")


def _setting_helps() -> dict[str, str]:
    helps = {}
    for field, hint in zip(dataclasses.fields(CompressionSettings), get_type_hints(CompressionSettings).values(), strict=True):
        for own in dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else (field,):
            helps[own.name] = str(own.metadata.get("help", "")).replace("%", "%%")
    return helps


_HELPS = _setting_helps()
