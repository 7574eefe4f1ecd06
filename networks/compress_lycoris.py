"""base=lycoris.kohya: a LyCORIS network (LoCon, DoRA, LoHa, LoKr, ...) with compressed saving.

LyCORIS writes its own file, and that is compressed as any file is: what is no pair of down and up is converted to one where that is
possible, dora_scale and norms are carried over as they are. Pruning and quantizing while it trains is for pairs: LoCon and DoRA.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_compress import (
    CompressedLora,
    CompressionReport,
    CompressionSettings,
    FormatError,
    LowRankUpdate,
    SettingsError,
    atomic_path,
    compress_file,
    is_packed,
    open_lora,
)
from lora_compress.report import PartReport
from lora_compress.training import Pair, TrainingSession, live_weight

__all__ = ["LycorisNetwork", "check_lycoris", "shape_like_layers"]

logger = logging.getLogger(__name__)


def check_lycoris(network: Any, settings: CompressionSettings) -> None:
    """Refuse settings that do nothing to a network, and tell of modules that will be saved as they are.

    Raises:
        SettingsError: compression is asked for, and none of the network's modules can be read as a low-rank update.
    """
    modules = _modules(network)
    if settings.acts_in_training:
        if problems := _training_problems(modules, settings):
            raise SettingsError(problems, "base=lycoris.kohya")
        if others := Counter(type(module).__name__ for module in modules if not _is_pair(module)):
            logger.warning("no pairs of down and up, trained and saved as they are: %s", dict(others))
        return
    kinds = {type(module).__name__: module for module in modules}
    if not settings.enabled or not kinds:
        return
    readable = _readable(kinds)
    names = ", ".join(sorted(kinds.keys() - readable))
    if not readable:
        raise SettingsError(
            [f"{names} of LyCORIS cannot be compressed: choose algo=lora, loha, lokr or full, or switch compression off"],
            "base=lycoris.kohya",
        )
    if names:
        count = sum(type(module).__name__ not in readable for module in modules)
        logger.warning("%d modules (%s) cannot be compressed and will be saved as they are", count, names)


def _training_problems(modules: list[Any], settings: CompressionSettings) -> list[str]:
    """What keeps pairs from being pruned and quantized while they are trained."""
    pairs, problems = [module for module in modules if _is_pair(module)], []
    if not pairs:
        problems.append(
            "pruning and quantizing while training needs pairs of down and up: choose algo=lora or locon without use_tucker"
        )
    if any(isinstance(module.scalar, nn.Parameter) for module in pairs):
        problems.append("use_scalar cannot be used with pruning and quantizing while training: remove one of the two")
    pruning = settings.pruning
    if any(module.wd for module in pairs) and (
        pruning.layer_threshold or (settings.training.iterative_pruning and not pruning.rank_floor)
    ):
        problems.append("min_rank=0 and layer_threshold would drop magnitudes of DoRA that were trained: set min_rank=1")
    return problems


def shape_like_layers(weights: Mapping[str, Tensor], text_encoder: Any, unet: nn.Module) -> dict[str, Tensor]:
    """`weights` with the factors of convolutions in the shapes of convolutions: what was converted may have come as matrices.

    LyCORIS builds a module of the layer's kind and copies the factors into it as they are.
    """
    encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder] if text_encoder else []
    several = isinstance(text_encoder, list)
    roots = {"lora_unet": unet, **{f"lora_te{i if several else ''}": encoder for i, encoder in enumerate(encoders, 1)}}
    layers = {f"{prefix}_{name}".replace(".", "_"): layer for prefix, root in roots.items() for name, layer in root.named_modules()}
    shaped = dict(weights)
    for key, tensor in weights.items():
        name, _, factor = key.partition(".")
        layer = layers.get(name)
        if isinstance(layer, nn.Conv2d) and tensor.ndim == 2 and factor in ("lora_down.weight", "lora_up.weight"):
            shape = layer.weight.shape[1:] if factor == "lora_down.weight" else (tensor.shape[1], 1, 1)
            shaped[key] = tensor.reshape(tensor.shape[0], *shape)
    return shaped


class LycorisNetwork:
    """Goes before `CompressNetwork` in a network of LyCORIS."""

    compression: CompressionSettings
    session: TrainingSession | None

    def apply_to(self, *args: Any, **kwargs: Any) -> None:
        """As `CompressNetwork` does; where a session watches what goes into a pair, its down is called for that."""
        super().apply_to(*args, **kwargs)  # type: ignore[misc]
        settings = self.compression.training
        if self.session is not None and (settings.collect_calibration or settings.importance == "activation"):
            for module in _pair_modules(self):
                module.org_module[0].register_forward_pre_hook(_shown_to(module.lora_down))

    def pairs(self) -> dict[str, Pair]:
        """LoCon modules and those of DoRA."""
        return {
            module.lora_name: Pair(module.lora_name, module.lora_down, module.lora_up, float(module.scale))
            for module in _pair_modules(self)
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What is trained: LyCORIS takes the weights of its layers, which under a session are what they compute with."""
        with nullcontext() if self.session is None else self.session.uncompressed():
            return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def compress(self, dtype: torch.dtype | None = None, metadata: dict[str, str] | None = None) -> CompressedLora:
        """Of a session; what is no pair, and magnitudes of DoRA, are carried as they are."""
        found: CompressedLora = super().compress(dtype, metadata)  # type: ignore[misc]
        return found.carrying(_beside_pairs(self))

    def apply_max_norm_regularization(self, max_norm_value: float, device: Any) -> Any:
        """LyCORIS's, which puts what it scales by into a scalar of its own; for a session it goes into up."""
        found = _host(self).apply_max_norm_regularization(self, max_norm_value, device)
        if self.session is not None:
            for module in _pair_modules(self):
                live_weight(module.lora_up).data.mul_(module.scalar)
                module.scalar.fill_(1.0)
        return found

    def updates(self) -> dict[str, LowRankUpdate]:
        """The live weights of LoCon modules, of DoRA without its magnitudes; what has no pair of down and up is left out."""
        return {module.lora_name: _pair(module) for module in _pair_modules(self)}

    def load_weights(self, file: str) -> Any:
        """LoCon and DoRA: a file of any kind, as `CompressNetwork` does; other algorithms: LyCORIS's own files.

        Raises:
            SettingsError: a packed file, whose modules are pairs, and the network has others.
        """
        if all(_is_pair(module) for module in _modules(self)):
            return super().load_weights(file)  # type: ignore[misc]
        if is_packed(file):
            raise SettingsError(["its modules were converted to plain LoRA, which this algo cannot hold: use algo=lora"], file)
        return _host(self).load_weights(self, file)

    def _write(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> CompressionReport:
        """Write LyCORIS's file beside `file`, compress it into `file`, and remove it; what a session made is written as it is."""
        if self.session is not None:
            return super()._write(file, dtype, metadata)  # type: ignore[misc]
        with tempfile.TemporaryDirectory(dir=Path(file).parent, prefix=".lycoris-") as folder:
            whole = Path(folder) / "lora.safetensors"
            with atomic_path(whole) as temporary:
                _host(self).save_weights(self, str(temporary), torch.float32, dict(metadata or {}))
            settings = replace(self.compression, budget=replace(self.compression.budget, allow_larger=True))
            found = compress_file(whole, file, settings, save_dtype=dtype or torch.float32, untrained=True)
            weights = sum(tensor.numel() for tensor in nn.Module.state_dict(self).values())  # type: ignore[arg-type]
            before = os.path.getsize(whole) - weights * (4 - (dtype or torch.float32).itemsize)
        modules = {
            module.name: PartReport((1, int(module.rank[1] > 0)), module.rank, module.squared_error, module.squared_norm)
            for module in found.modules
        }
        return CompressionReport.of_modules(modules, (before, found.bytes[1]))


def _host(network: Any) -> Any:
    """LyCORIS's own class of a network, whose methods are behind ours."""
    return next(cls for cls in type(network).__mro__ if cls.__module__.startswith("lycoris."))


def _modules(network: Any) -> list[Any]:
    return network.text_encoder_loras + network.unet_loras


def _pair_modules(network: Any) -> list[Any]:
    """LoCon modules and those of DoRA."""
    return [module for module in _modules(network) if _is_pair(module)]


def _is_pair(module: Any) -> bool:
    return type(module).__name__ == "LoConModule" and not module.tucker


def _pair(module: Any) -> LowRankUpdate:
    up = live_weight(module.lora_up).detach() * module.scalar.detach()
    return LowRankUpdate(live_weight(module.lora_down).detach(), up, float(module.scale) * module.lora_dim)


def _beside_pairs(network: Any) -> dict[str, Tensor]:
    """What LyCORIS would write beside pairs of down and up: dora_scale, norms, modules of other kinds."""
    return {
        f"{module.lora_name}.{key}": tensor.detach().cpu().contiguous()
        for module in _modules(network)
        for key, tensor in module.state_dict().items()
        if not (_is_pair(module) and key in ("lora_down.weight", "lora_up.weight", "alpha"))
    }


def _shown_to(down: nn.Module) -> Any:
    """A hook for the layer that a module changes: while the network learns and someone watches its down, that is called."""

    def show(layer: nn.Module, args: Any) -> None:
        if down.training and torch.is_grad_enabled() and (down._forward_hooks or down._forward_pre_hooks):
            down(args[0].detach().to(live_weight(down).dtype))

    return show


def _readable(kinds: dict[str, Any]) -> set[str]:
    """The kinds of modules that the readers of files make an update of: asked with a file that holds one of each."""
    tensors = {
        f"lora_unet_{kind}.{key}": torch.ones_like(tensor, memory_format=torch.contiguous_format)  # zeros are an update of anything
        for kind, module in kinds.items()
        for key, tensor in module.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "kinds.safetensors")
        try:
            source = open_lora(Path(folder) / "kinds.safetensors")
        except FormatError:  # it holds nothing that can be read
            return set()
        try:
            return {kind for kind in kinds if f"lora_unet_{kind}" in source}
        finally:
            source.close()
