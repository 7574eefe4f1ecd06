"""Values of the config file for sd-scripts' own options: handed on as sd-scripts reads them, or converted with a warning."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_compress import SettingsError, setting_names
from lora_compress.settings import HostOption, describe_value, is_same_value, read_host_value
from networks.compress_bases import networks_with_argument

__all__ = ["HostValues", "check_dataset_config", "read_as_sd_scripts", "read_host_values"]

logger = logging.getLogger(__name__)

_SECRETS = ("wandb_api_key", "huggingface_token")  # whose values do not belong into a log
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class HostValues:
    """What a config file says of options of sd-scripts that has to be converted.

    Args:
        converted: by option, the value of the file and the one that sd-scripts is to get.
    """

    converted: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def apply(self, args: argparse.Namespace) -> None:
        """Put the converted values in place of those of the file; what the command line says stays."""
        for name, (raw, usable) in self.converted.items():
            if is_same_value(getattr(args, name, None), raw):
                setattr(args, name, usable)


def read_host_values(
    config: Mapping[str, Any], parser: argparse.ArgumentParser, own: Collection[str], sections: Collection[str], path: str | None
) -> HostValues:
    """Check what a config file says of the options of `parser`.

    One warning names all values that have to be converted, another one all keys that have no effect.

    Args:
        config: the config file as nested dicts.
        parser: sd-scripts' parser with our options added.
        own: names of our options, whose values must be of the right type.
        sections: names of our sections, which are not looked at.
        path: of the config file, for messages.

    Raises:
        SettingsError: values without a meaning, all of them in one error.
    """
    options = {action.dest: _host_option(action) for action in parser._actions if action.dest != "help"}
    found, notes, unknown, problems = HostValues(), {}, [], []
    for section, name, value in _host_entries(config, sections, options):
        where = f"[{section}] {name}" if section else name
        if name not in options:
            unknown.append(f"{where} is not an option of sd-scripts for this model{_remedy(name, value, options)}")
            continue
        found.converted.pop(name, None)  # of two sections with the same key, the last one counts
        notes.pop(name, None)
        try:
            usable = read_host_value(options[name], value)
        except ValueError as error:
            shown = "(not shown)" if name in _SECRETS else repr(value)
            problems.append(f"{where} = {shown}: must be {error}")
            continue
        if is_same_value(usable, value):
            continue
        if name in own:
            problems.append(f"{where} = {value!r}: must be written {describe_value(usable)}")
        found.converted[name] = value, usable
        notes[name] = f"{where} is converted" if name in _SECRETS else _conversion(where, value, usable)
    if problems:
        raise SettingsError(problems, str(path))
    if notes:
        logger.warning("%s: %s", path, "; ".join(notes.values()))
    if unknown:
        logger.warning("%s: keys without effect: %s", path, "; ".join(unknown))
    return found


def read_as_sd_scripts(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    read: Callable[[argparse.Namespace, argparse.ArgumentParser], argparse.Namespace],
) -> argparse.Namespace:
    """The arguments as sd-scripts' own function `read_config_from_file` gives them.

    sd-scripts takes a byte order mark, which editors on Windows put at the beginning of a file, for part of the first key. Such a
    file is read from a copy without it.
    """
    path = args.config_file
    if not path or args.output_config:
        return read(args, parser)
    content = Path(path if path.endswith(".toml") else path + ".toml").read_bytes()
    if not content.startswith(_BYTE_ORDER_MARK):
        return read(args, parser)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "config.toml"
        copy.write_bytes(content.removeprefix(_BYTE_ORDER_MARK))
        args.config_file = str(copy)
        args = read(args, parser)
    args.config_file = os.path.splitext(path)[0]
    return args


def _conversion(where: str, value: Any, usable: Any) -> str:
    return f"{where} = {describe_value(value)} is read as {describe_value(usable)}"


def check_dataset_config(args: argparse.Namespace) -> None:
    """Refuse a data set config that begins with a byte order mark, which sd-scripts takes for a part of the first key.

    Raises:
        SettingsError: it does.
    """
    path = Path(args.dataset_config or "")
    if path.is_file() and path.read_bytes().startswith(_BYTE_ORDER_MARK):
        raise SettingsError(
            ["begins with a byte order mark, which sd-scripts cannot read: save it as UTF-8 without one"], str(path)
        )


def _host_option(action: argparse.Action) -> HostOption:
    many = action.nargs in ("*", "+") or (isinstance(action.nargs, int) and action.nargs > 0)
    kind = bool if action.nargs == 0 else str if action.type in (None, Path) else action.type
    return HostOption(action.dest, kind, action.default, tuple(action.choices or ()), many)  # type: ignore[arg-type]


def _host_entries(
    config: Mapping[str, Any], sections: Collection[str], options: Mapping[str, HostOption]
) -> Iterable[tuple[str, str, Any]]:
    """Section, key and value of all entries but ours, in the order of the file; "" for the section of a key that stands in none."""
    for section, values in config.items():
        if not isinstance(values, Mapping):
            yield "", section, values
        elif section in sections:
            continue
        elif section in options and options[section].many and not values.keys() <= options.keys():
            yield "", section, values  # network_args = {conv_dim = 4}: a table where a list belongs, and no section of options
        else:
            yield from ((section, name, value) for name, value in values.items())


def _remedy(name: str, value: Any, options: Collection[str]) -> str:
    """What to do about a key that sd-scripts does not have; "" where nothing can be told."""
    if isinstance(value, Mapping):
        return " (a table within a table, of which nothing is read: move its keys one level up)"
    if name == "datasets":
        return " (data sets stand in a file of their own, which dataset_config names)"
    if name in setting_names():
        return " (a setting of LoRA Compress: put it into [pruning] or [quantization])"
    if networks_with_argument(name):
        return f' (an argument of the network: network_args = ["{name}={value}"])'
    close = difflib.get_close_matches(name, options, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
