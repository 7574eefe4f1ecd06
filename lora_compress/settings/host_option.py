"""The options of sd-scripts as records, and what is the same for single values and lists of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["NONE_WORDS", "HostOption", "describe_value", "is_same_value", "parse_number"]

# What programs write for a field that was left empty: Python's None, JSON's null, JavaScript's undefined and NaN.
NONE_WORDS = ("none", "null", "undefined", "nan")


@dataclass(frozen=True)
class HostOption:
    """An option of the program that trains.

    Args:
        name: its key in a TOML file.
        kind: bool for a flag; int, float or str; or a function that converts the text of a command line.
        default: its value where it is not set.
        choices: the values that are allowed; empty where all are.
        many: whether it takes a list of values of that kind.
    """

    name: str
    kind: Callable[[str], Any]
    default: Any = None
    choices: tuple[Any, ...] = ()
    many: bool = False


def is_same_value(one: Any, other: Any) -> bool:
    """Whether two values are equal and of the same type, through lists: true is not 1, and 1.0 is not 1."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same_value, one, other))
    return type(one) is type(other) and bool(one == other)


def describe_value(value: Any) -> str:
    """A value as a TOML file would have it.

    >>> describe_value(["a=1", True])
    '["a=1", true]'
    """
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(describe_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name} = {describe_value(entry)}' for name, entry in value.items())}}}"
    return str(value)


def parse_number(value: Any, expected: str) -> int | float:
    """The number that a value is or spells; true is none, since it is seldom meant to be 1."""
    if value is True:
        raise ValueError(expected)
    if value is False:
        return 0
    if isinstance(value, str):
        for kind in (int, float):
            try:
                value = kind(value)
                break
            except ValueError:
                continue
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(expected)
    return value
