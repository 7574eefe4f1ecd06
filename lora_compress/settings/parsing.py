"""Turns text and TOML values into typed settings by name; what is unknown or does not parse becomes a sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from ..errors import SettingsError

__all__ = ["names_of", "parse_section", "parse_values", "pick", "read_config", "read_toml", "refuse_setting"]

Section = TypeVar("Section")

_TOML_REMEDIES = {  # by a part of the message of the package toml
    "escape sequence": r": in a path write / for \, or put it in single quotes",
    "homogeneous array": ": in a list write all numbers with a decimal point, or none",
    "lowercase booleans": ": write true and false in small letters",
    "Duplicate keys": ": the same key stands in the file twice",
}
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


def parse_section(kind: type[Section], values: Mapping[str, Any], where: str) -> Section:
    """Settings of one dataclass from `{name: text or number}` pairs.

    Raises:
        SettingsError: unknown names, values of the wrong type or range, contradictions; all of them in one error.
    """
    parsed, problems = parse_values(values, names_of(kind))
    try:
        settings = kind(**parsed)
    except SettingsError as error:
        raise SettingsError([*problems, *error.problems], where) from None
    if problems:
        raise SettingsError(problems, where)
    return settings


def read_toml(path: str) -> dict[str, Any]:
    """A TOML file as nested dicts.

    Raises:
        SettingsError: there is no such file, or it is no TOML.
    """
    import toml  # for those who train; the core alone does without it

    try:
        with open(path, encoding="utf-8-sig") as file:
            return toml.load(file)
    except FileNotFoundError:
        raise SettingsError(["no such file: give the path of a TOML file"], path) from None
    except UnicodeDecodeError as error:
        raise SettingsError([f"not valid TOML, which is text in UTF-8 ({error}): save the file in that encoding"], path) from error
    except (toml.TomlDecodeError, IndexError) as error:
        remedy = next((remedy for part, remedy in _TOML_REMEDIES.items() if part in str(error)), "")
        raise SettingsError([f"not valid TOML: {error}{remedy}"], path) from error
    except OSError as error:
        raise SettingsError([f"cannot be read: {error.strerror}"], path) from error


def read_config(path: str) -> dict[str, Any]:
    """The config file of a training as nested dicts. The extension .toml may be left out, as in sd-scripts.

    Raises:
        SettingsError: there is no such file, or it is no TOML.
    """
    if path.endswith(".json") and Path(path).is_file():
        raise SettingsError(
            ["is JSON, and config files are TOML: the kohya_ss GUI writes config_lora-<time>.toml to the output folder"], path
        )
    return read_toml(path if path.endswith(".toml") else path + ".toml")


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
