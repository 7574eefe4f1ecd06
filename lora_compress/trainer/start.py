"""What `train_network_ext.py --host diffusers` does: reads a TOML and single options over it, and trains."""

from __future__ import annotations

import argparse
import logging
import sys

from ..errors import LoraCompressError, SettingsError
from ..settings import read_config
from ..text import visible
from .options import DEFAULTS, DONE_IN_ANY_CASE

__all__ = ["main"]

_SECTIONS = ("pruning", "quantization", "evaluation", "adaptive")


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 after one line that says what is wrong; options --name value win over the file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="train_network_ext.py", allow_abbrev=False)
    parser.add_argument("--host", choices=["diffusers"], required=True, help="train with diffusers, without sd-scripts")
    parser.add_argument("--config_file", "--config", required=True, help="TOML: docs/training_diffusers.md lists its keys")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", action="store_true" if default is False else "store", default=None)
    for name in DONE_IN_ANY_CASE:
        parser.add_argument(f"--{name}", nargs="?", help=argparse.SUPPRESS)
    for name in (*_SECTIONS, "network_args"):
        parser.add_argument(f"--{name}", nargs="*", metavar="KEY=VALUE", default=None)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    try:
        config = dict(read_config(given["config_file"]))
        for name in _SECTIONS:
            if name in given:
                config[name] = {**config.get(name, {}), **dict(_pair(name, text) for text in given[name])}
        over = {name: value for name, value in given.items() if name in (*DEFAULTS, "network_args")}
        from .training import train

        logging.getLogger(__name__).info("%s", train({**config, "command line": over}))
    except LoraCompressError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 2
    return 0


def _pair(section: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError([f"--{section} {text}: is no key=value"], "command line")
    return name, value
