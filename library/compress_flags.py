"""What to say of a flag that the training script does not have: the one that was meant, where that can be told."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from lora_compress import SettingsError
from lora_compress.settings import SECTIONS

__all__ = ["parse_flags"]

# Flags of resize_lora_ext.py, and what a training has instead.
_RESIZE_FLAGS = {
    "format": "--quantization save_format=...",
    "device": "--quantization quantization_device=...",
    "model": "--pretrained_model_name_or_path",
    "src_model": "--pretrained_model_name_or_path",
    "save_to": "--output_dir and --output_name",
    "dst_model": "--output_dir and --output_name",
    "for": "--quantization save_format=kohya, which every program opens",
}


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse all of `argv`.

    Raises:
        SettingsError: a flag is unknown; says where the setting of that name is given, or which flag is closest.
    """
    args, rest = parser.parse_known_args(list(argv))
    if rest:
        raise SettingsError([_refusal(parser, rest)], "command line")
    return args


def _refusal(parser: argparse.ArgumentParser, rest: Sequence[str]) -> str:
    flag, _, value = rest[0].partition("=")
    if not flag.startswith("-"):
        return f"{flag}: belongs to no flag: give each value after its flag, and paths with spaces in quotes"
    name = flag.lstrip("-").replace("-", "_").lower()
    value = value or (rest[1] if len(rest) > 1 and not rest[1].startswith("-") else "...")
    known = {option.lstrip("-"): option for action in parser._actions for option in action.option_strings}
    if name in known:  # only its hyphens or capitals differ
        return f"{flag}: unknown flag, did you mean {known[name]}?"
    for section, names in SECTIONS.items():
        if name in names:
            return f"{flag}: is a setting of [{section}]: write --{section} {name}={value}"
    if name in _RESIZE_FLAGS:
        return f"{flag}: is a flag of resize_lora_ext.py: for a training write {_RESIZE_FLAGS[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"{flag}: unknown flag" + (f", did you mean {known[close[0]]}?" if close else ": --help lists every flag")
