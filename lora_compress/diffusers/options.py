"""What the trainer is told: the usual keys of kohya's TOML files, and the pictures with their captions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import LoraCompressError, SettingsError
from ..evaluation.pictures import PICTURE_ENDINGS
from ..settings import CompressionSettings

__all__ = ["find_pictures", "make_optimizer", "read_options", "resolution"]

logger = logging.getLogger(__name__)

_DEFAULTS: dict[str, Any] = {
    "pretrained_model_name_or_path": None,
    "train_data_dir": None,
    "caption_extension": ".txt",
    "resolution": "512,512",
    "train_batch_size": 1,
    "max_train_steps": 1600,
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
    "save_every_n_steps": None,
    "save_precision": "fp16",
    "seed": 0,
    "output_dir": None,
    "output_name": "last",
}
_CHOICES = {"mixed_precision": ("no", "bf16"), "save_precision": ("fp16", "bf16", "float")}
_RATES = {"unet_lr": 1e-4, "text_encoder_lr": 1e-5}  # unless learning_rate says otherwise
_REQUIRED = ("pretrained_model_name_or_path", "train_data_dir", "output_dir")


def read_options(config: Mapping[str, Any]) -> tuple[dict[str, Any], CompressionSettings]:
    """Options of the trainer and settings of the compression; keys of neither are named in one warning.

    Raises:
        SettingsError: one that is required is missing, or a value that is not to be had here.
    """
    own: dict[str, Any] = {}
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("pruning", "quantization"):
            section = dict(value)
            own |= section if section.pop("enabled", True) else {}
        else:
            flat |= value if isinstance(value, Mapping) else {name: value}
    if unknown := sorted(set(flat) - set(_DEFAULTS)):
        logger.warning("--host diffusers does not know and leaves out: %s", ", ".join(unknown))
    options = {name: flat.get(name, default) for name, default in _DEFAULTS.items()}
    problems = [f"{name} is missing: set it" for name in _REQUIRED if not options[name]]
    problems += [f"{name}={options[name]}: must be one of {', '.join(c)}" for name, c in _CHOICES.items() if options[name] not in c]
    if problems:
        raise SettingsError(problems, "--host diffusers")
    for name, rate in _RATES.items():
        if options[name] is None:
            options[name] = rate if options["learning_rate"] is None else options["learning_rate"]
    return options, CompressionSettings.parse(own)


def resolution(options: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height."""
    sizes = [int(part) for part in str(options["resolution"]).split(",")]
    return sizes[0], sizes[-1]


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
