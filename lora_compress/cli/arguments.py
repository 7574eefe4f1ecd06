"""Flags: those that all verbs share, a flag for every setting, and a parser whose errors are one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, get_type_hints

import torch

from ..errors import LoraCompressError, SettingsError
from ..settings import CompressionSettings, QatSettings, QuantizationSettings, TrainingSettings, setting_names

__all__ = ["PRECISIONS", "Parser", "UsageError", "add_setting_flags", "flag_settings", "parse_settings", "quantize_pairs"]

PRECISIONS = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_QUANTIZE = {field.name for field in dataclasses.fields(QuantizationSettings)}
_TRAINING = {field.name for part in (TrainingSettings, QatSettings) for field in dataclasses.fields(part)}  # no file learns
_ALIASES = {"save_format": ("--format", "--save_format"), "quantization_device": ("--device", "--quantization_device")}
_METAVARS = {float: "X", int: "N", str: "TEXT", bool: "true|false"}


class UsageError(LoraCompressError):
    """The command line is wrong: which flag, what was found, what is allowed, what to do."""


class Parser(argparse.ArgumentParser):
    """Takes whole flag names only and raises `UsageError` instead of leaving the process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument ") + " (--help lists every flag)")

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
        if flag.lstrip("-") in _QUANTIZE:
            return f"{flag}: is a part of --quantize: write --quantize {flag.lstrip('-')}=..."
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(flag, known, n=1)
        return f"{flag}: unknown flag" + (f", did you mean {close[0]}?" if close else ": --help lists every flag")


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting but those of quantization, which are the names that --quantize takes."""
    group = parser.add_argument_group("what to keep and how to store it (any of these can be combined)")
    for name, kind in setting_names().items():
        if name in _QUANTIZE or name in _TRAINING:
            continue
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        group.add_argument(*_ALIASES.get(name, (f"--{name}",)), dest=name, metavar=_METAVARS[kind], help=_HELPS.get(name), **switch)
    group.add_argument("--quantize", nargs="+", action="extend", metavar="NAME=VALUE", help=_quantize_help())


def flag_settings(args: argparse.Namespace) -> dict[str, str]:
    """The settings given as flags, as text by name."""
    return {name: getattr(args, name) for name in setting_names() if getattr(args, name, None) is not None}


def quantize_pairs(words: Iterable[str] | None) -> dict[str, str]:
    """`bits=4 strategy=nf4` as {name: text}.

    Raises:
        UsageError: a word without =, or a name that --quantize does not take.
    """
    pairs = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"--quantize {word}: must be NAME=VALUE with NAME one of {', '.join(sorted(_QUANTIZE))}")
        if name not in _QUANTIZE:
            own_flag = f": it is a flag of its own, --{name} {value}" if name in setting_names() else ""
            close = difflib.get_close_matches(name, sorted(_QUANTIZE), n=1)
            hint = own_flag or (f", did you mean {close[0]}?" if close else f": it takes {', '.join(sorted(_QUANTIZE))}")
            raise UsageError(f"--quantize {word}: {name} is no part of --quantize{hint}")
        pairs[name] = value
    return pairs


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
