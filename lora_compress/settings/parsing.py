"""Turns text and TOML values into typed settings by name; what is unknown or does not parse becomes a sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

__all__ = ["names_of", "parse_values", "pick", "refuse_setting"]

_TYPE_NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false", Path: "a path"}


def names_of(settings: type) -> dict[str, type]:
    """The fields of a settings dataclass with their types; that of an optional one is what it is when given."""
    return {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(settings).items()}


def parse_values(values: Mapping[str, Any], known: Mapping[str, type]) -> tuple[dict[str, Any], list[str]]:
    """What `values` say by name, and what is wrong with those that say nothing."""
    problems = [refuse_setting(name, known) for name in values if name not in known]
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            try:
                parsed[name] = _convert(value, known[name])
            except (KeyError, TypeError, ValueError, OverflowError):
                problems.append(f"{name}={value!r}: must be {_TYPE_NAMES[known[name]]}")
    return parsed, problems


def pick(parsed: Mapping[str, Any], settings: type) -> dict[str, Any]:
    """Those of `parsed` that are fields of a settings dataclass."""
    return {f.name: parsed[f.name] for f in fields(settings) if f.name in parsed}


def refuse_setting(name: str, known: Iterable[str]) -> str:
    """The sentence that refuses `name`: the closest of the names that are `known`, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f", did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
    return f"{name}: unknown setting{hint}"


def _convert(value: Any, kind: type) -> Any:
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).strip().lower()]
    if isinstance(value, bool) or value is None:
        raise ValueError
    if kind is str:
        if not isinstance(value, str):
            raise ValueError
        return value.strip().lower()
    if kind is int and isinstance(value, float):
        raise ValueError
    return kind(value)
