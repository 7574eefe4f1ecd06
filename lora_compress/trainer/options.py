"""What the trainer is told: the usual keys of kohya's TOML files, and the pictures with their captions."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import LoraCompressError, SettingsError
from ..evaluation.pictures import PICTURE_ENDINGS
from ..settings import (
    AdaptiveSettings,
    CompressionSettings,
    EvaluationSettings,
    HostOption,
    describe_value,
    is_same_value,
    read_host_value,
    setting_names,
)

__all__ = ["DEFAULTS", "DONE_IN_ANY_CASE", "Plan", "find_pictures", "make_optimizer", "read_plan"]

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {
    "pretrained_model_name_or_path": None,
    "train_data_dir": None,
    "caption_extension": ".txt",
    "resolution": "512,512",
    "train_batch_size": 1,
    "max_train_steps": 1600,
    "max_train_epochs": None,
    "network_dim": 4,
    "network_alpha": 1.0,
    "learning_rate": None,
    "unet_lr": None,
    "text_encoder_lr": None,
    "optimizer_type": "AdamW",
    "max_grad_norm": 1.0,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "base_quantize": None,
    "load_8bit_text_encoder": False,
    "save_every_n_steps": None,
    "save_precision": "fp16",
    "save_peft": False,
    "save_state": False,
    "save_state_on_train_end": False,
    "resume": None,
    "sample_prompts": None,
    "sample_every_n_steps": None,
    "sample_sampler": None,
    "validate_every_n_steps": None,
    "seed": 0,
    "output_dir": None,
    "output_name": "last",
}
_CHOICES = {
    "mixed_precision": ("no", "bf16"),
    "save_precision": ("fp16", "bf16", "float"),
    "base_quantize": (None, "int8", "nf4", "fp8", "quanto", "torchao"),
    "sample_sampler": (None, "ddim"),
}
_NUMBERS: dict[str, type] = {
    **{name: type(default) for name, default in DEFAULTS.items() if type(default) in (int, float)},
    **dict.fromkeys(("learning_rate", "unet_lr", "text_encoder_lr"), float),
    **dict.fromkeys(("max_train_epochs", "save_every_n_steps", "sample_every_n_steps", "validate_every_n_steps"), int),
}
_OPTIONS = {
    name: HostOption(name, _NUMBERS.get(name, bool if default is False else str), default, _CHOICES.get(name, ()))
    for name, default in DEFAULTS.items()
} | {"network_args": HostOption("network_args", str, many=True)}
_RATES = {"unet_lr": 1e-4, "text_encoder_lr": 1e-5}  # unless learning_rate says otherwise
_REQUIRED = ("pretrained_model_name_or_path", "train_data_dir", "output_dir")
DONE_IN_ANY_CASE = {  # options of sd-scripts: what they ask for is what is done here
    *("network_module", "save_model_as", "tokenizer_cache_dir", "cache_latents", "vae_batch_size", "max_data_loader_n_workers"),
}


@dataclass(frozen=True)
class Plan:
    """What a training is to do.

    Args:
        options: by the names of `DEFAULTS`; numbers are numbers, resolution is (width, height).
        compression: of [pruning], [quantization] and network_args.
        evaluation: of [evaluation], None where there is none.
        adaptive: of [adaptive] as it is, None where there is none.
    """

    options: Mapping[str, Any]
    compression: CompressionSettings
    evaluation: EvaluationSettings | None
    adaptive: Mapping[str, Any] | None

    def output(self, suffix: str) -> Path:
        """A path in output_dir that begins with output_name."""
        return Path(self.options["output_dir"]) / f"{self.options['output_name']}{suffix}"

    def in_steps(self, per_epoch: int) -> Plan:
        """The same plan with max_train_epochs and a share in lr_warmup_steps turned into steps, as sd-scripts does.

        Args:
            per_epoch: steps that an epoch takes.
        """
        options = dict(self.options)
        if options["max_train_epochs"]:
            options["max_train_steps"] = options["max_train_epochs"] * per_epoch
        if isinstance(options["lr_warmup_steps"], float):
            options["lr_warmup_steps"] = int(options["lr_warmup_steps"] * options["max_train_steps"])
        return replace(self, options=options)


def read_plan(config: Mapping[str, Any]) -> Plan:
    """From a TOML; values that have to be converted and keys that are not known are named in one warning each.

    Raises:
        SettingsError: one that is required is missing, or a value that is not to be had here.
    """
    flat, sections, problems = _flatten(config)
    values, wrong = _read_values(flat, config.get("command line", {}))
    problems += wrong
    given = dict(pair.partition("=")[::2] for pair in values.pop("network_args", None) or ())
    own: dict[str, Any] = {name: value for name, value in given.items() if name in setting_names()}
    own |= sections.pop("pruning", {}) | sections.pop("quantization", {})
    unknown = sorted({*flat} - {*_OPTIONS} - DONE_IN_ANY_CASE) + [f"network_args {name}" for name in given if name not in own]
    if unknown:
        logger.warning("--host diffusers does not know and leaves out: %s", ", ".join(unknown))
    options = {**DEFAULTS, **values}
    problems += [f"{name} is missing: set it" for name in _REQUIRED if not options[name]]
    problems += _read_resolution(options)
    if "adaptive" in sections and "evaluation" not in sections:
        problems.append("[adaptive] follows the evaluations of the training, and there are none: add a section [evaluation]")
    if problems:
        raise SettingsError(problems, "--host diffusers")
    for name, rate in _RATES.items():
        if options[name] is None:
            options[name] = rate if options["learning_rate"] is None else options["learning_rate"]
    if "adaptive" in sections:
        own = AdaptiveSettings.parse(sections["adaptive"]).completed(own)
    evaluation = EvaluationSettings.parse(sections["evaluation"]) if "evaluation" in sections else None
    return Plan(options, CompressionSettings.parse(own), evaluation, sections.get("adaptive"))


def _flatten(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """All keys of the trainer at one level, our sections that are not off, and what is wrong with their switches."""
    flat: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    problems = []
    for name, value in config.items():
        if name in ("pruning", "quantization", "evaluation", "adaptive") and isinstance(value, Mapping):
            section = dict(value)
            enabled = str(section.pop("enabled", True)).lower()
            if enabled not in ("true", "false"):
                problems.append(f"[{name}] enabled={enabled}: must be true or false")
            if enabled != "false":
                sections[name] = section
        elif isinstance(value, Mapping) and (name != "network_args" or value.keys() <= {*_OPTIONS, *DONE_IN_ANY_CASE}):
            flat |= value
        else:
            flat[name] = value
    return flat, sections, problems


def _read_values(flat: Mapping[str, Any], on_command_line: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of the options that are given, and what is wrong with others. Conversions are named in one warning.

    Args:
        flat: keys and values of the config file and of the command line.
        on_command_line: names of those whose values are texts by nature.
    """
    values, problems, notes = {}, [], []
    for name, value in flat.items():
        if name not in _OPTIONS:
            continue
        if name in _RATES and isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]  # the same rate for each text encoder
        try:
            usable = read_host_value(_OPTIONS[name], value)
        except ValueError as error:
            problems.append(f"{name}={value}: must be {error}")
            continue
        if usable == "":
            usable = DEFAULTS.get(name)
        values[name] = float(usable) if _NUMBERS.get(name) is float and usable is not None else usable
        if not is_same_value(usable, value) and name not in on_command_line:
            notes.append(f"{name} = {describe_value(value)} is read as {describe_value(usable)}")
    if notes:
        logger.warning("--host diffusers: %s", "; ".join(notes))
    return values, problems


def _read_resolution(options: dict[str, Any]) -> list[str]:
    """Make (width, height) of the resolution, in place; what is wrong with it."""
    try:
        sizes = [int(part) for part in str(options["resolution"]).split(",")]
        options["resolution"] = sizes[0], sizes[-1]
    except ValueError:
        return [f"resolution={options['resolution']}: must be width,height, such as 512,512"]
    return []


def find_pictures(options: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """Pictures with captions in folders <repeats>_<name>, each as often as its folder says.

    Raises:
        LoraCompressError: there are none, or one has no caption.
    """
    found = []
    for folder in sorted(Path(options["train_data_dir"]).glob("[0-9]*_*")):
        repeats = int(folder.name.partition("_")[0])
        for path in sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_ENDINGS):
            caption = path.with_suffix(options["caption_extension"])
            if not caption.is_file():
                raise LoraCompressError(f"{path}: has no caption {caption.name} beside it: write one, or set caption_extension")
            found += [(path, caption.read_text(encoding="utf-8").strip())] * repeats
    if not found:
        raise LoraCompressError(f"{options['train_data_dir']}: no pictures in folders <repeats>_<name>: set train_data_dir")
    return found


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer of torch by its name, or of bitsandbytes: AdamW, AdamW8bit, Lion8bit, ...

    Raises:
        LoraCompressError: neither has it, or bitsandbytes is missing.
    """
    kind = getattr(torch.optim, name, None)
    if kind is None:
        try:
            import bitsandbytes

            kind = getattr(bitsandbytes.optim, name, None)
        except ImportError as error:
            raise LoraCompressError(f"optimizer_type={name}: needs bitsandbytes ({error}): pip install bitsandbytes") from error
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise LoraCompressError(f"optimizer_type={name}: torch.optim and bitsandbytes have no such optimizer: AdamW is one")
    found: torch.optim.Optimizer = kind(groups)  # type: ignore[call-arg]
    return found
