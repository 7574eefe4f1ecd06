"""Train a LoRA with sd-scripts and save it compressed: `accelerate launch train_network_ext.py --config_file config/lora.toml`.

Takes every option and config of sd-scripts' own network trainers, and those of `--help` under "LoRA Compress".
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

if __name__ == "__main__" and (
    "--host=diffusers" in sys.argv or ("--host", "diffusers") in zip(sys.argv, sys.argv[1:], strict=False)
):
    from library.compress_torchvision import declare_missing_operators
    from lora_compress.trainer.start import main as train_with_diffusers  # before sd-scripts is looked for

    declare_missing_operators()
    sys.exit(train_with_diffusers(sys.argv[1:]))

import networks.sd_scripts_path  # noqa: F401  joins our packages with those of sd-scripts: must come before either is used

# isort: split
from library import train_util
from library.compress_base import BaseModelMixin, add_base_arguments, check_base_arguments
from library.compress_config import (
    add_arguments,
    check_host_values,
    forget_own_sections,
    merge_adaptive,
    merge_evaluation,
    merge_network_args,
    read_toml,
)
from library.compress_flags import parse_flags
from library.compress_flux import adapt_flux_sizes
from library.compress_host import check_dataset_config, read_as_sd_scripts
from library.compress_model import adapt_sd_widths, adapt_sdxl_widths, detect_model_type, require_model
from library.compress_resume import check_resume
from library.compress_trainer import CompressTrainerMixin
from library.compress_validation import ValidationMixin
from lora_compress import LoraCompressError
from networks.compress_bases import import_base, split_arguments


def _leave_as_is(args: argparse.Namespace) -> None:
    """For a trainer that builds its model in one size."""


@dataclass(frozen=True)
class Host:
    """A trainer of sd-scripts.

    Args:
        name: the model type.
        script: its module.
        trainer: its class.
        network: the network module that `networks.lora_compress` extends for it.
        adapt: lets sd-scripts build a model that is narrower than the usual one.
        timesteps: the module whose show_timesteps its script calls, in versions that have it.
    """

    name: str
    script: str
    trainer: str
    network: str
    adapt: Callable[[argparse.Namespace], None] = _leave_as_is
    timesteps: str = ""


_FLUX = ("flux_train_network", "FluxNetworkTrainer", "networks.lora_flux", adapt_flux_sizes, "library.flux_train_utils")
_HOSTS = (
    Host("sd", "train_network", "NetworkTrainer", "networks.lora", adapt_sd_widths),
    Host("sdxl", "sdxl_train_network", "SdxlNetworkTrainer", "networks.lora", adapt_sdxl_widths),
    Host("sd3", "sd3_train_network", "Sd3NetworkTrainer", "networks.lora_sd3"),
    Host("flux", *_FLUX),
    Host("chroma", *_FLUX),
    Host("lumina", "lumina_train_network", "LuminaNetworkTrainer", "networks.lora_lumina"),
    Host("hunyuan_image", "hunyuan_image_train_network", "HunyuanImageNetworkTrainer", "networks.lora_hunyuan_image"),
    Host("anima", "anima_train_network", "AnimaNetworkTrainer", "networks.lora_anima", timesteps="library.anima_train_utils"),
)
HOSTS = {host.name: host for host in _HOSTS}


def choose_host(argv: list[str]) -> Host:
    """The trainer for what the command line, or the config file it names, says of the model.

    Raises:
        LoraCompressError: the model is missing, or of a type that cannot be told.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config_file", "--config", default=None)
    for name in ("--model_type", "--pretrained_model_name_or_path"):
        early.add_argument(name, default=None)
    given, _ = early.parse_known_args(argv)
    if {"-h", "--help"} & set(argv):
        return HOSTS.get(given.model_type, HOSTS["sd"])
    config = read_toml(given.config_file)
    flat = {**config, **{key: value for section in config.values() if isinstance(section, dict) for key, value in section.items()}}
    model = require_model(given.pretrained_model_name_or_path or str(flat.get("pretrained_model_name_or_path") or ""))
    kind = given.model_type or str(flat.get("model_type") or "auto").strip().lower()
    if kind not in (*HOSTS, "auto"):
        raise LoraCompressError(f"model_type={kind}: must be one of {', '.join(HOSTS)}, auto")
    return HOSTS[detect_model_type(model) if kind == "auto" else kind]


def parse_arguments(argv: list[str], host: Host) -> argparse.Namespace:
    """The host's own parsing of command line and config file, with our settings merged into network_args.

    Raises:
        SettingsError: wrong or unknown settings.
    """
    parser = _script(host).setup_parser()
    theirs = {action.dest for action in parser._actions}
    add_arguments(parser, HOSTS)
    add_base_arguments(parser)
    args = parse_flags(parser, argv)
    train_util.verify_command_line_training_args(args)
    config = {} if args.output_config else read_toml(args.config_file)
    values = check_host_values(config, parser, theirs, args.config_file)
    args = read_as_sd_scripts(args, parser, train_util.read_config_from_file)
    values.apply(args)
    forget_own_sections(args, config, parser)
    network_args = merge_network_args(
        args, config, lambda merged: split_arguments(merged, import_base(merged.get("base") or host.network))
    )
    args.network_args = network_args or args.network_args
    args.evaluation = merge_evaluation(args, config)
    args.adaptive = merge_adaptive(args, config)
    args.model_type = host.name  # the FLUX trainer reads it, under the same two names
    if getattr(args, "attn_mode", None) == "sdpa":
        args.attn_mode = "torch"  # as the scripts of HunyuanImage and Anima do
    check_base_arguments(args)
    check_dataset_config(args)
    return args


def _script(host: Host) -> ModuleType:
    try:
        return importlib.import_module(host.script)
    except ModuleNotFoundError as error:
        if error.name != host.script:
            raise
        raise LoraCompressError(f"model_type={host.name}: this sd-scripts has no {host.script}.py: use a newer version") from error


def _require_network(name: str | None) -> None:
    """Refuse a network module that is missing before a model is loaded.

    Raises:
        LoraCompressError: none is named, or it cannot be found.
    """
    if not name:
        raise LoraCompressError("network_module: not set: networks.lora_compress saves compressed, networks.lora as ever")
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise LoraCompressError(
            f"network_module={name}: neither sd-scripts nor this environment has it: install what it belongs to, "
            "or use networks.lora_compress"
        )


def main() -> int:
    """Exit status 0, or 2 after one line that says what is wrong."""
    argv = sys.argv[1:]
    try:
        host = choose_host(argv)
        args = parse_arguments(argv, host)
        if host.timesteps and getattr(args, "show_timesteps", None):
            importlib.import_module(host.timesteps).show_timesteps(args)
            return 0
        _require_network(args.network_module)
        check_resume(args)
        host.adapt(args)
        trainer = getattr(_script(host), host.trainer)
        type(f"Compress{host.trainer}", (CompressTrainerMixin, ValidationMixin, BaseModelMixin, trainer), {})().train(args)
    except LoraCompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
