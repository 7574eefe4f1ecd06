"""What `train_network_ext.py --host diffusers` does: reads a TOML and single options over it, and trains."""

from __future__ import annotations

import argparse
import logging
import sys

from ..errors import LoraCompressError
from ..settings import read_toml

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 after one line that says what is wrong; options --name value win over the file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="train_network_ext.py", allow_abbrev=False)
    parser.add_argument("--host", choices=["diffusers"], required=True, help="train with diffusers, without sd-scripts")
    parser.add_argument("--config_file", "--config", required=True, help="TOML: docs/training_diffusers.md lists its keys")
    for name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir", "output_name", "max_train_steps", "seed"):
        parser.add_argument(f"--{name}", default=None)
    given = vars(parser.parse_args(argv))
    del given["host"]
    try:
        config = read_toml(given.pop("config_file"))
        over = {name: value for name, value in given.items() if value is not None}
        from .training import train

        logging.getLogger(__name__).info("%s", train({**config, "command line": over}))
    except LoraCompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
