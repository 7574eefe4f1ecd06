"""The frozen base of a training: stored in 8 or 4 bits, and what learns beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..diffusers.attaching import peft_misfit
from ..errors import MissingPackageError
from ..frozen import WEIGHT_FORMATS, quantize_frozen, require_bitsandbytes
from ..training import Pair, find_pairs
from .denoising import Denoiser

__all__ = ["add_adapters"]

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]


def add_adapters(denoiser: Denoiser, options: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Pair], Groups]:
    """Freeze all models, store them as base_quantize and load_8bit_text_encoder say, and add what learns.

    Quanto and torchao replace weights before PEFT looks at the layers; int8, nf4 and fp8 are stored in the layers that it wraps.

    Returns:
        Pairs of PEFT by kohya's names, in float32, and the groups of their weights for an optimizer. A learning rate of 0 leaves
        a model out.

    Raises:
        MissingPackageError: the library that stores the base is not installed.
        SettingsError: its release, or that of transformers, and PEFT's do not fit.
    """
    stored = _stored(denoiser, options)
    for name, kind in stored.items():
        if kind not in WEIGHT_FORMATS:
            _LIBRARIES[kind](denoiser.models[name])
    pairs: dict[str, Pair] = {}
    groups = []
    for model in denoiser.models.values():
        model.requires_grad_(False)
    for prefix, (name, targets) in denoiser.parts.items():
        rate = options["unet_lr" if name == denoiser.component else "text_encoder_lr"]
        if rate:
            found = _adapted(denoiser.models[name], prefix, targets, options)
            groups.append({"params": [weight for pair in found.values() for weight in pair.weights], "lr": rate})
            pairs |= found
    denoiser.texts_learn = any(not name.startswith(denoiser.prefix) for name in pairs)
    for name, kind in stored.items():
        if kind in WEIGHT_FORMATS:
            packed = quantize_frozen(denoiser.models[name], kind, device, keep=lambda path: ".lora_" in path)
            logger.info("%s: %d layers in %s, %.0f%% of the bytes are gone", name, packed.layers, kind, 100 * packed.saved)
    return pairs, groups


def _adapted(model: Any, prefix: str, targets: Any, options: Mapping[str, Any]) -> dict[str, Pair]:
    from peft import LoraConfig, inject_adapter_in_model

    model.train()
    config = LoraConfig(r=options["network_dim"], lora_alpha=options["network_alpha"], target_modules=list(targets))
    try:
        # Not model.add_adapter: transformers 5.24 asks there for a PEFT that has not been released.
        inject_adapter_in_model(config, model)
    except (ImportError, TypeError, ValueError) as error:  # of PEFT's code for a library that stores the weights
        raise peft_misfit(error) from None
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    if options["gradient_checkpointing"]:
        if hasattr(model, "enable_gradient_checkpointing"):  # of diffusers, which is never reentrant
            model.enable_gradient_checkpointing()
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    named = {f"{prefix}_{name.replace('.', '_')}": pair for name, pair in find_pairs(model).items()}
    return {name: replace(pair, name=name, module=name) for name, pair in named.items()}


def _stored(denoiser: Denoiser, options: Mapping[str, Any]) -> dict[str, str]:
    """How components are to be stored, by name: the denoiser, and text encoders in int8."""
    found = {denoiser.component: options["base_quantize"]} if options["base_quantize"] else {}
    if options["load_8bit_text_encoder"]:
        found |= {name: "int8" for name in denoiser.models if name.startswith("text_encoder")}
    if any(kind in WEIGHT_FORMATS and WEIGHT_FORMATS[kind].bitsandbytes for kind in found.values()):
        require_bitsandbytes(" and ".join(name for name in ("base_quantize", "load_8bit_text_encoder") if options[name]))
    return found


def _quanto(model: torch.nn.Module) -> None:
    try:
        from optimum.quanto import freeze, qint8, quantize
    except ImportError as error:
        raise MissingPackageError(f"base_quantize=quanto: {error}: pip install optimum-quanto") from error
    others = [name for name, layer in model.named_modules() if not isinstance(layer, torch.nn.Linear)]
    quantize(model, weights=qint8, exclude=others)  # PEFT makes adapters of a convolution of its own class, which needs weights
    freeze(model)


def _torchao(model: torch.nn.Module) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise MissingPackageError(f"base_quantize=torchao: {error}: pip install torchao") from error
    quantize_(model, Int8WeightOnlyConfig())


_LIBRARIES = {"quanto": _quanto, "torchao": _torchao}
