"""Memory of the frozen base: U-Net or DiT and text encoders stored in 8 or 4 bits, checkpointing without reentrance."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from lora_compress import SettingsError
from lora_compress.frozen import WEIGHT_FORMATS, quantize_frozen, require_bitsandbytes

__all__ = ["BaseModelMixin", "add_base_arguments", "check_base_arguments"]

logger = logging.getLogger(__name__)

_TEXT_ENCODER_FORMAT = "int8"  # the type that transformers' T5 knows for packed weights
# Networks that put their product beside that of the layer. What multiplies or reads the layer's weight would take codes for it.
_NETWORKS = re.compile(r"networks\.(lora|loha|lokr)(_\w+)?")
# Their first weight's type is what the sinusoids of the timestep are cast to, and every layer depends on them.
_TIMESTEPS = re.compile(r"Timestep\w*")


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """Add our options on the base model to the host's parser."""
    group = parser.add_argument_group("LoRA Compress: memory (docs/memory.md)")
    group.add_argument(
        "--base_quantize",
        choices=list(WEIGHT_FORMATS),
        default=None,
        help="store the frozen U-Net or DiT in int8 (half of fp16), nf4 (a quarter; convolutions in int8), or fp8 (the host's)",
    )
    group.add_argument("--load_8bit_text_encoder", action="store_true", help="store the frozen text encoders in int8")


def check_base_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before a model is loaded.

    Raises:
        SettingsError: options that contradict each other, all of them.
        LoraCompressError: bitsandbytes is needed, and missing or too old.
    """
    used = _given(args, "base_quantize", "load_8bit_text_encoder")
    if not used:
        return
    problems = []
    if _NETWORKS.fullmatch(str(args.network_module)) is None:
        problems.append(f"{used} and network_module={args.network_module}, which may read the weights: use networks.lora_compress")
    if base := [arg for arg in args.network_args or [] if re.match(r"base=(?!networks\.lora)", arg)]:
        problems.append(f"{used} and {base[0]} in network_args, which may read the weights: leave one out")
    if args.deepspeed:
        problems.append(f"{used} and deepspeed: leave one out")
    if args.base_quantize == "fp8" and args.mixed_precision == "no":
        problems.append("base_quantize=fp8 computes in another type: set mixed_precision to bf16 or fp16")
    if args.base_quantize not in (None, "fp8") and (stored := _given(args, "fp8_base", "fp8_base_unet", "fp8_scaled")):
        problems.append(f"base_quantize={args.base_quantize} and {stored} both store the base: leave one out")
    if args.load_8bit_text_encoder and (stored := _given(args, "fp8_base", "fp8_vl")) and not args.fp8_base_unet:
        problems.append(f"load_8bit_text_encoder and {stored} both store the text encoders: leave one out, or use fp8_base_unet")
    if problems:
        raise SettingsError(problems, str(args.config_file or "command line"))
    if args.load_8bit_text_encoder or WEIGHT_FORMATS[args.base_quantize].bitsandbytes:
        require_bitsandbytes(used)


class BaseModelMixin:
    """Goes before a NetworkTrainer of sd-scripts (v0.10.0 to v0.11.1) among the bases of a trainer."""

    _host_stores_fp8 = False

    def assert_extra_args(self, args: argparse.Namespace, *groups: Any) -> None:
        """The host's; asks it for its own fp8, where that was chosen and it has one: fp8_scaled, or else fp8_base_unet.

        A trainer that has none takes the option back in here. On a CPU none of them runs: torch has no norms in fp8 there.
        """
        if args.base_quantize == "fp8" and torch.accelerator.is_available():
            setattr(args, "fp8_scaled" if hasattr(args, "fp8_scaled") else "fp8_base_unet", True)
        super().assert_extra_args(args, *groups)  # type: ignore[misc]
        self._host_stores_fp8 = bool(_given(args, "fp8_base", "fp8_base_unet", "fp8_scaled"))

    def cache_text_encoder_outputs_if_needed(
        self, args: argparse.Namespace, accelerator: Any, unet: Any, vae: Any, text_encoders: Iterable[Any], *rest: Any
    ) -> None:
        """The host's, which moves the text encoders to the GPU; packs them before, if nothing is trained or merged into them.

        Some networks look at the weights that they will train when they are made, which is between this and the other hook.
        """
        if args.load_8bit_text_encoder and args.network_train_unet_only and not args.base_weights:
            _pack_text_encoders(text_encoders, accelerator.device)
        super().cache_text_encoder_outputs_if_needed(args, accelerator, unet, vae, text_encoders, *rest)  # type: ignore[misc]

    def post_process_network(
        self, args: argparse.Namespace, accelerator: Any, network: Any, text_encoders: Iterable[Any], unet: Any
    ) -> None:
        """The host's; then packs the base: base_weights are merged, the network has found its layers and wraps none of them yet."""
        super().post_process_network(args, accelerator, network, text_encoders, unet)  # type: ignore[misc]
        if args.base_quantize is not None and not (args.base_quantize == "fp8" and self._host_stores_fp8):
            _pack(type(unet).__name__, unet, args.base_quantize, accelerator.device)
        if args.load_8bit_text_encoder:
            _pack_text_encoders(text_encoders, accelerator.device)
        if args.gradient_checkpointing:
            _checkpoint_without_reentrance(unet, text_encoders)

    def update_metadata(self, metadata: dict[str, Any], args: argparse.Namespace) -> None:
        """The host's, and how the base was stored."""
        super().update_metadata(metadata, args)  # type: ignore[misc]
        if args.base_quantize is not None:
            metadata["ss_compress_base_quantize"] = args.base_quantize
        if args.load_8bit_text_encoder:
            metadata["ss_compress_8bit_text_encoder"] = True


def _pack_text_encoders(text_encoders: Iterable[Any], device: torch.device) -> None:
    for index, text_encoder in enumerate(text_encoders, start=1):
        _pack(f"text encoder {index}", text_encoder, _TEXT_ENCODER_FORMAT, device)


def _pack(label: str, model: torch.nn.Module, name: str, device: torch.device) -> None:
    embedders = {path for path, module in model.named_modules() if _TIMESTEPS.fullmatch(type(module).__name__)}
    packed = quantize_frozen(model, name, device, keep=lambda path: any(path.startswith(f"{kept}.") for kept in embedders))
    if packed.layers:
        sizes = f"{packed.before / 1e6:.0f} MB in fp16 -> {packed.after / 1e6:.0f} MB"
        logger.info("%s: %d frozen layers in %s, %s", label, packed.layers, name, sizes)


def _checkpoint_without_reentrance(unet: Any, text_encoders: Iterable[Any]) -> None:
    """use_reentrant=False for what the host would checkpoint otherwise: the U-Net of SDXL, text encoders of transformers."""
    module = sys.modules[type(unet).__module__]
    if hasattr(module, "USE_REENTRANT"):
        module.USE_REENTRANT = False  # type: ignore[attr-defined]
    for text_encoder in text_encoders:
        if hasattr(text_encoder, "gradient_checkpointing_enable"):
            enable = partial(text_encoder.gradient_checkpointing_enable, gradient_checkpointing_kwargs={"use_reentrant": False})
            text_encoder.gradient_checkpointing_enable = enable


def _given(args: argparse.Namespace, *names: str) -> str:
    """Those of the options that are set, as text."""
    return " and ".join(name for name in names if getattr(args, name, None))
