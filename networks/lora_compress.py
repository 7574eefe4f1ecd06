"""sd-scripts' LoRA network with compressed saving: `--network_module networks.lora_compress`.

It takes the same network_args as `networks.lora` and, unless they ask for more, trains exactly as that does: what it adds then
happens when a file is written or read. With iterative_pruning or qat a `TrainingSession` is attached to its modules.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

import networks.sd_scripts_path  # noqa: F401  joins our packages with those of sd-scripts: must come before either is used

# isort: split
from lora_compress import (
    CompressionReport,
    CompressionSettings,
    FormatError,
    LowRankUpdate,
    SaveError,
    SettingsError,
    as_kohya,
    atomic_path,
    compress,
    estimate_size,
    is_packed,
    kohya_partner,
    load_lora,
    opened_by,
    save,
    settings_table,
)
from lora_compress.training import Pair, TrainingSession, find_pairs, write_calibration
from networks.compress_bases import LYCORIS, base_module, host_arguments, split_arguments
from networks.compress_lycoris import LycorisNetwork, check_lycoris, shape_like_layers
from networks.compress_modules import live_update, module_tensors
from networks.compress_split import SplitNetwork, split_network

__all__ = ["CompressNetwork", "base_module", "create_network", "create_network_from_weights", "host_arguments"]

_DIVERGED = (
    "NaN or infinity: the training diverged; what was saved before is kept: go on from there with a lower learning_rate, "
    "or with mixed_precision=bf16 where it is fp16"
)
_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}


def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    """The network of `base_module` for this model, extended by `CompressNetwork`. `kwargs` are network_args, all of them strings.

    Raises:
        SettingsError: a network_arg that neither we nor the host know, or values that contradict each other.
    """
    base, settings, host_args = _read_arguments(unet, kwargs)
    split = base.__name__ != LYCORIS and str(host_args.pop("split_qkv", "")).lower() == "true"
    network = base.create_network(
        multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=neuron_dropout, **host_args
    )
    if split:
        split_network(network, host_args)
    return _extend(network, settings, split)


def create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd=None, for_inference=False, **kwargs):
    """The host's network at the ranks of `file`, which may be packed; returns it with the file's weights in kohya's layout."""
    base, settings, host_args = _read_arguments(unet, kwargs)
    if weights_sd is None and is_packed(file):
        lora = load_lora(file)
        weights_sd = as_kohya(lora.updates) | lora.others
        if base.__name__ == LYCORIS:
            weights_sd = shape_like_layers(weights_sd, text_encoder, unet)
    network, weights_sd = base.create_network_from_weights(
        multiplier, file, vae, text_encoder, unet, weights_sd, for_inference, **host_args
    )
    network = _extend(network, settings)
    network._learns = not for_inference
    return network, weights_sd


def _read_arguments(unet: Any, kwargs: Mapping[str, Any]) -> tuple[ModuleType, CompressionSettings, dict[str, Any]]:
    """The module to extend, our settings, and its own arguments; it compares truth values with "True", so that is how they come."""
    base = base_module(unet, kwargs.get("base"))
    settings, host_args = split_arguments(kwargs, base)
    host_args.pop("base", None)
    return base, settings, {name: {"true": "True", "false": "False"}.get(str(v).lower(), v) for name, v in host_args.items()}


class CompressNetwork:
    """What is put over the host's LoRANetwork: compressed saving, and loading of packed files and of other ranks and alphas.

    Attributes:
        compression: the settings.
        report: of the last compressed save, None before.
        session: prunes and quantizes while the network learns; None where nothing of the kind is asked for, and before apply_to.
    """

    compression: CompressionSettings
    report: CompressionReport | None = None
    session: TrainingSession | None = None
    _learns = True
    _args: Any = None
    _save_dtype: torch.dtype | None = None
    _announced = True  # nothing to announce until prepare_network says that a training starts
    _with_partner: tuple[Path, ...] = ()

    def prepare_network(self, args) -> None:
        """Called by the trainer before training: what would fail at the first save fails here.

        Raises:
            SettingsError: the file type cannot hold what the settings ask for.
            SaveError: the output folder cannot be written.
        """
        if self.compression.enabled and args.save_model_as != "safetensors":
            raise SettingsError([f"save_model_as={args.save_model_as} cannot hold a compressed LoRA: use safetensors"])
        if self.compression.acts_in_training and getattr(args, "deepspeed", False):
            problem = "deepspeed cannot be used with iterative_pruning, qat and collect_calibration: remove it"
            reason = "the optimizer state of a LoRA is too small to be worth sharing out"
            raise SettingsError([f"{problem}; {reason}"], "training arguments")
        _check_writable(args.output_dir)
        self._args = args
        self._save_dtype = _PRECISIONS.get(args.save_precision)
        self._announced = False

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True) -> None:
        """The host's, then the effective settings and the size to expect, in the log once a training."""
        super().apply_to(text_encoder, unet, apply_text_encoder, apply_unet)
        if self.compression.acts_in_training and self._learns and self.session is None:
            self.session = TrainingSession(self.pairs(), self.compression, self._total_steps)
            self.compress_training = self.session.state  # a submodule: goes wherever the host saves and loads the network
        if not self._announced:
            self._announced = True
            updates, values = self.updates(), self.compression.as_dict()
            if len(updates) == len(self.text_encoder_loras + self.unet_loras):  # what LyCORIS has beside pairs is not known yet
                size = estimate_size(updates, self.compression, self._save_dtype)
                most = "at most " if self.compression.size_is_open else ""
                values |= {"expected file size": f"{most}{size / 1e6:.2f} MB"}
            tqdm.write(settings_table(values, "compression"))

    def pairs(self) -> dict[str, Pair]:
        """The pairs of layers that are trained, by name."""
        return find_pairs(self)

    def updates(self) -> dict[str, LowRankUpdate]:
        """The live weights of all modules, detached, by name."""
        return {lora.lora_name: live_update(lora) for lora in self.text_encoder_loras + self.unet_loras}

    def compress(self, dtype: torch.dtype | None = None, metadata: dict[str, str] | None = None):
        """The live weights, compressed as the settings say, in memory."""
        if self.session is not None:
            return self.session.compress(dtype, metadata)
        return compress(self.updates(), self.compression, dtype, metadata)

    def save_weights(self, file, dtype, metadata) -> None:
        """Write `file` as the settings say; with all compression off, the host's own bytes. Atomic either way.

        Raises:
            FormatError: a weight is NaN or infinite; nothing is written.
            SaveError: it cannot be written.
        """
        self.check_finite(file, (metadata or {}).get("ss_steps"))
        self._remove_lone_partners()
        self._save(file, dtype, metadata)
        if self.session is not None and self.session.calibrated:
            tqdm.write(f"calibration: {write_calibration(self.session, file)}")

    def check_finite(self, path: str | os.PathLike[str], step: str | None = None) -> None:
        """Check that there is something worth saving to `path`, after `step` steps.

        Raises:
            FormatError: a weight is NaN or infinite; what was saved before stays the last one.
        """
        for name, weight in self.state_dict().items():
            if weight.is_floating_point() and not name.startswith("compress_training.") and not bool(weight.isfinite().all()):
                after = f"after step {step} " if step else ""
                raise FormatError(f"{path}: not saved: {after}{name} holds {_DIVERGED}")

    def _save(self, file, dtype, metadata) -> None:
        if not self.compression.enabled:
            state = self._modules.pop("compress_training", None)  # no part of a LoRA
            try:
                with atomic_path(file) as temporary:
                    super().save_weights(str(temporary), dtype, metadata)
            finally:
                if state is not None:
                    self.compress_training = state
            return
        self.report = self._write(file, dtype, metadata)
        tqdm.write(f"{self.report}\n{opened_by(file, str(self.compression.save_format))}")
        if self.compression.save_format == "both":
            self._with_partner = (*self._with_partner, Path(file))

    def _write(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> CompressionReport:
        return save(self.compress(dtype, metadata), file, dtype)

    def load_weights(self, file):
        """Load a kohya or packed file into the live modules, whatever its ranks (up to theirs) and alphas.

        The host keeps the scale of each module as it was built, so a file of another alpha is rescaled; a smaller rank fills
        the first components and leaves the others as new.

        Raises:
            FormatError: the file cannot be read.
            SettingsError: a module of the file has more components than the network's.
        """
        loaded = load_lora(file)
        modules = {lora.lora_name: lora for lora in self.text_encoder_loras + self.unet_loras}
        tensors = dict(loaded.others)
        for name, update in loaded.updates.items():
            tensors |= module_tensors(modules[name], update, str(file)) if name in modules else as_kohya({name: update})
        return self.load_state_dict(tensors, False)

    def _total_steps(self) -> int:
        """Of the whole training. The trainer turns epochs into steps after it has called prepare_network: read when asked."""
        if self._args is None:
            raise SettingsError(
                ["iterative_pruning and qat need the number of steps: call prepare_network(args) with args.max_train_steps first"]
            )
        return int(self._args.max_train_steps)

    def _remove_lone_partners(self) -> None:
        """The host deletes old files by the name it gave them: the kohya partner of a file that is gone goes too."""
        for packed in self._with_partner:
            if not packed.exists():
                kohya_partner(packed).unlink(missing_ok=True)
        self._with_partner = tuple(packed for packed in self._with_partner if packed.exists())


def _extend(network: torch.nn.Module, settings: CompressionSettings, split: bool = False) -> torch.nn.Module:
    cls = type(network)
    if cls.__module__ == LYCORIS:
        check_lycoris(network, settings)
    bases = (LycorisNetwork, CompressNetwork) if cls.__module__ == LYCORIS else (CompressNetwork,)
    network.__class__ = type(f"Compress{cls.__name__}", (*bases, *([SplitNetwork] if split else []), cls), {})
    network.compression = settings
    return network


def _check_writable(folder: str | None) -> None:
    if folder is None:
        raise SettingsError(["output_dir: not set: name the folder to save to"], "training arguments")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SaveError(f"output_dir={folder}: cannot be written ({error.strerror}): choose another folder") from error
