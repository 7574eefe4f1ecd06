"""What the user asked for: kohya's TOML with our sections, the command line, network_args, brought into one list."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from library.compress_host import HostValues, read_host_values
from lora_compress import AdaptiveSettings, CompressionSettings, EvaluationSettings, SettingsError, refuse_setting, setting_names
from lora_compress.settings import SECTIONS, read_config, split_pairs
from networks.compress_bases import empty_arguments, unread_arguments

__all__ = [
    "add_arguments",
    "check_host_values",
    "forget_own_sections",
    "merge_adaptive",
    "merge_evaluation",
    "merge_network_args",
    "read_toml",
]

logger = logging.getLogger(__name__)

NETWORK_MODULE = "networks.lora_compress"
_EVALUATION = [f.name for f in fields(EvaluationSettings)]  # for the trainer: the network knows nothing of it
_ADAPTIVE = [f.name for f in fields(AdaptiveSettings)]  # likewise
_ALL_SECTIONS = {**SECTIONS, "evaluation": _EVALUATION, "adaptive": _ADAPTIVE}


def add_arguments(parser: argparse.ArgumentParser, model_types: Iterable[str]) -> None:
    """Add our options to the host's parser."""
    group = parser.add_argument_group("LoRA Compress")
    group.add_argument("--config", dest="config_file", type=str, default=None, help="same as --config_file")
    theirs = next((action for action in parser._actions if action.dest == "model_type"), None)  # the FLUX trainer's: flux, chroma
    model_type = theirs or group.add_argument("--model_type")
    model_type.choices, model_type.default = [*model_types, "auto"], "auto"
    model_type.help = "the trainer to use; auto (default) looks at the checkpoint. FLUX's own --model_type is this one"
    for section, names in _ALL_SECTIONS.items():
        spellings = [f"--{section}", *(["--quantize"] if section == "quantization" else [])]
        told = f"enabled, {', '.join(names)}; overrides [{section}]"
        group.add_argument(*spellings, dest=section, nargs="+", default=None, metavar="KEY=VALUE", help=told)
    group.add_argument("--quantization_device", type=str, default=None, help="where SVD and quantizers run: cpu (default), cuda")


def read_toml(path: str | None) -> dict[str, Any]:
    """The config file as nested dicts; {} where none is given.

    Raises:
        SettingsError: there is no such file, or it is no TOML.
    """
    return {} if path is None else read_config(path)


def check_host_values(
    config: Mapping[str, Any], parser: argparse.ArgumentParser, theirs: Iterable[str], path: str | None
) -> HostValues:
    """Check the config file's values of all options; those of sd-scripts are made usable, ours must be right.

    Args:
        config: the config file.
        parser: sd-scripts' parser with our options added.
        theirs: the options that it had before.
        path: of the config file.

    Raises:
        SettingsError: values without a meaning, all of them in one error.
    """
    own = {action.dest for action in parser._actions} - {*theirs, "model_type"}
    return read_host_values(config, parser, own, _ALL_SECTIONS, path)


def merge_network_args(args: argparse.Namespace, config: Mapping[str, Any], split: Callable[[Mapping[str, Any]], Any]) -> list[str]:
    """network_args as the network will get them. The command line wins over network_args, those over our sections.

    Args:
        args: of the host's parser.
        config: the config file.
        split: checks all of them for the network that is extended, as `split_arguments` does.

    Raises:
        SettingsError: settings that nobody knows, contradict each other, or go to a network that cannot use them.
    """
    given = [part for entry in args.network_args or [] for part in split_pairs(str(entry))]
    network_args = dict(_key_values(given, "network_args"))
    below: dict[str, Any] = {}
    above: dict[str, Any] = {}
    for section, names in SECTIONS.items():
        flags = _section_values(dict(_key_values(getattr(args, section) or [], f"--{section}")), names, f"--{section}")
        in_file = config.get(section, {})
        if isinstance(in_file, dict):
            below |= _section_values(in_file, names, f"{args.config_file}: [{section}]") or {}
        if flags is None:  # --quantization enabled=false
            network_args = {name: value for name, value in network_args.items() if name not in names}
            below = {name: value for name, value in below.items() if name not in names}
        above |= flags or {}
    if args.quantization_device is not None:
        above["quantization_device"] = args.quantization_device
    merged = {**below, **network_args, **above}
    ours = {name: value for name, value in merged.items() if name in setting_names()}
    if args.network_module == NETWORK_MODULE:
        split(merged)
    elif problems := empty_arguments(merged):
        raise SettingsError([*problems.values()], "network_args")
    elif any(name not in network_args for name in ours):
        raise SettingsError(
            [f"{', '.join(ours)} given, but network_module is {args.network_module}: set network_module = {NETWORK_MODULE}"],
            str(args.config_file or "command line"),
        )
    elif unread := unread_arguments(merged, args.network_module):
        logger.warning("network_args: %s does not read %s", args.network_module, "; ".join(unread))
    return [f"{name}={value}" for name, value in merged.items()]


def merge_evaluation(args: argparse.Namespace, config: Mapping[str, Any]) -> list[str] | None:
    """The settings of [evaluation] and, above them, of --evaluation, as key=value; None where neither is given or one is off.

    Raises:
        SettingsError: unknown or wrong settings, all of them in one error.
    """
    return _merge_section(args, config, "evaluation", EvaluationSettings.parse)


def merge_adaptive(args: argparse.Namespace, config: Mapping[str, Any]) -> list[str] | None:
    """Likewise of [adaptive] and --adaptive; to be called when network_args and evaluation have been merged.

    Sets in network_args what changes of ranks and bits need, unless something else is said there.

    Raises:
        SettingsError: unknown or wrong settings; no evaluation to go by; another network module.
    """
    merged = _merge_section(args, config, "adaptive", AdaptiveSettings.parse)
    if merged is None:
        return None
    problems = []
    if args.evaluation is None:
        problems.append("follows the evaluations of the training, and there are none: add a section [evaluation]")
    if args.network_module != NETWORK_MODULE:
        problems.append(f"network_module is {args.network_module}: set network_module = {NETWORK_MODULE}")
    if problems:
        raise SettingsError(problems, "[adaptive]")
    given = dict(_key_values(args.network_args or [], "network_args"))
    settings = AdaptiveSettings.parse(dict(_key_values(merged, "--adaptive")))
    complete = settings.completed(given)
    CompressionSettings.parse({name: value for name, value in complete.items() if name in setting_names()})
    args.network_args = [f"{name}={value}" for name, value in complete.items()]
    return merged


def _merge_section(
    args: argparse.Namespace, config: Mapping[str, Any], section: str, parse: Callable[[Mapping[str, Any]], Any]
) -> list[str] | None:
    in_file, flags = config.get(section), getattr(args, section)
    if not isinstance(in_file, dict) and flags is None:
        return None
    values: dict[str, Any] = {**(in_file if isinstance(in_file, dict) else {}), **dict(_key_values(flags or [], f"--{section}"))}
    enabled = str(values.pop("enabled", True)).lower()
    problems = [] if enabled in ("true", "false") else [f"enabled = {enabled!r}: must be true or false"]
    try:
        parse(values)
    except SettingsError as error:
        problems += error.problems
    if problems:
        raise SettingsError(problems, f"{args.config_file}: [{section}]" if flags is None else f"--{section}")
    return [f"{name}={value}" for name, value in values.items()] if enabled == "true" else None


def forget_own_sections(args: argparse.Namespace, config: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    """Take back what the host's flattening of all sections has put on `args` from ours."""
    options = {action.dest for action in parser._actions}
    for section in _ALL_SECTIONS:
        values = config.get(section)
        for name in values if isinstance(values, dict) else ():
            if name not in options and hasattr(args, name):
                delattr(args, name)


def _section_values(values: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any] | None:
    """The settings of one of our sections, None if it says enabled = false."""
    rest = dict(values)
    enabled = rest.pop("enabled", True)
    if str(enabled).lower() not in ("true", "false"):
        raise SettingsError([f"enabled = {enabled!r}: must be true or false"], where)
    if problems := [refuse_setting(name, ["enabled", *names]) for name in rest if name not in names]:
        raise SettingsError(problems, where)
    return rest if str(enabled).lower() == "true" else None


def _key_values(pairs: Iterable[str], where: str) -> Iterable[tuple[str, str]]:
    for pair in pairs:
        name, equals, value = str(pair).partition("=")
        if not equals:
            raise SettingsError([f"{pair!r}: must be written key=value"], where)
        yield name, value
