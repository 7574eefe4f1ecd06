"""Lists of sd-scripts' options, such as network_args, as people and their tools write them in TOML files."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from .host_option import NONE_WORDS, HostOption, describe_value, parse_number

__all__ = ["read_host_list", "split_pairs"]

# Arguments of FLUX networks whose values are pairs themselves, with commas between them.
_PAIRS_IN_VALUES = re.compile(r"network_reg_(dims|lrs)\s*=")
_KEY_VALUE_LISTS = ("network_args", "optimizer_args", "lr_scheduler_args")


def read_host_list(option: HostOption, value: Any) -> Any:
    """`value` of a TOML file as an option that takes a list needs it; `value` itself where it can be used as it stands.

    Raises:
        ValueError: it has no meaning for this option. The text says what has one.
    """
    if value == "" and option.kind is str:
        return value  # sd-scripts finds no entries in it
    if isinstance(value, str):
        value = _list_of_text(option, value)
    if value is None or value is False:
        return option.default
    if isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(part, Mapping) for part in value)):
        tables = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, Mapping)]
        texts = [f"{key}={entry}" for table in tables for key, entry in table.items()] or ["key=value"]
        raise ValueError(f"a list of texts, not a table: write {option.name} = {describe_value(texts)}")
    if option.name == "text_encoder_lr" and isinstance(value, (int, float)) and value is not True:
        return value  # one rate for all text encoders, which sd-scripts takes without a list
    entries = value if isinstance(value, list) else [value]
    if option.kind is not str:
        numbers = [parse_number(entry, "a list of numbers") for entry in entries]
        return [float(number) if isinstance(entry, str) else number for number, entry in zip(numbers, entries, strict=True)]
    if not all(isinstance(entry, str) for entry in entries):
        raise ValueError('a list of texts, such as ["key=value"]' if option.name in _KEY_VALUE_LISTS else "a list of texts")
    if option.name in _KEY_VALUE_LISTS:
        return [_key_value(pair, option.name != "network_args") for entry in entries for pair in split_pairs(entry)]
    return [entry for entry in entries if entry.strip()]


def _list_of_text(option: HostOption, text: str) -> Any:
    """The list that is meant by a text: several values with spaces between them, one a line, or a list in Python's spelling."""
    if not text.strip() or text.strip().lower() in NONE_WORDS:
        return None
    if text.strip().startswith("["):
        try:
            return list(ast.literal_eval(text.strip()))
        except (ValueError, SyntaxError):
            raise ValueError("a list") from None
    if option.kind is not str:
        return re.split(r"[\s,]+", text.strip())
    return [text] if option.name in _KEY_VALUE_LISTS else [line.strip() for line in text.splitlines()]


def split_pairs(text: str) -> list[str]:
    """The parts of `text` that are each a pair key=value. A value may have commas and spaces, as in betas=0.9, 0.99.

    >>> split_pairs("weight_decay=0.1 betas=0.9, 0.99")
    ['weight_decay=0.1', 'betas=0.9, 0.99']
    """
    between = r"\s+" if _PAIRS_IN_VALUES.search(text) else r"[\s,;]+"
    parts = re.split(between + r"""(?=["']?[A-Za-z_][\w.]*\s*=)""", text.strip())
    return [part[1:-1] if part[:1] in ("'", '"') and part[-1:] == part[:1] else part for part in parts if part]


def _key_value(text: str, literal: bool) -> str:
    """One pair without spaces around its name and its value, which is made a literal of Python where it has to be one."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise ValueError(f"a list of key=value, and {text!r} is none: {text!r} must be written key=value")
    if literal:
        value = _as_literal(name, value)
    return f"{name}={value}"


def _as_literal(name: str, value: str) -> str:
    """The value of an argument of an optimizer or scheduler, which sd-scripts evaluates: true as True, a bare word in quotes."""
    if not value:
        raise ValueError(f"a list of key=value, and {name} has no value: remove it, or write such as {name}=0.1")
    try:
        ast.literal_eval(value)
        return value
    except (ValueError, SyntaxError):
        if "=" in value:
            raise ValueError(f"a list of key=value, and {name}={value} has two signs of equality") from None
        words = {"true": "True", "false": "False", "none": "None", "null": "None"}
        return words.get(value.lower(), repr(value))
