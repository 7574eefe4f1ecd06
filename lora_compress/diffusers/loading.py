"""`load_lora`: a LoRA file onto a pipeline of diffusers, the counterpart of its load_lora_weights for packed files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch

from ..errors import FormatError, SettingsError
from ..names.diffusers import find_layers
from ..sources import LoraSource
from ..sources.load import read_lora
from ..sources.open import open_lora
from ..update import LowRankUpdate
from .attaching import attach_updates, dtype_of, swap_updates

__all__ = ["load_lora"]

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KINDS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def load_lora(
    pipe: Any, path: str | os.PathLike[str], adapter_name: str | None = None, weight: float = 1.0, hotswap: bool = False
) -> str:
    """Load a LoRA file, packed or of any plain layout, onto a pipeline for SD, SDXL, SD3 or FLUX.

    The adapter is one of PEFT, as load_lora_weights makes it: set_adapters, fuse_lora, unfuse_lora, delete_adapters and
    unload_lora_weights of the pipeline work on it. Every module has the rank and alpha that the file says.

        load_lora(pipe, "packed.safetensors", adapter_name="style", weight=0.8)

    Args:
        pipe: a pipeline of diffusers.
        path: of the file.
        adapter_name: no adapter of the pipeline has it, unless it is swapped; None for lora_0, lora_1, ...
        weight: strength of the adapter, which becomes the one that is active.
        hotswap: put the file in the place of the adapter `adapter_name`. Ranks may be smaller and layers fewer than those of the
            adapter, not larger or others. Tensors keep their places and shapes, so that a compiled model stays compiled.

    Returns:
        The name of the adapter.

    Raises:
        FormatError: the file cannot be read, or it is not for this pipeline: a module has no layer, or one of another size.
        SettingsError: there is an adapter of this name; with `hotswap` there is none, or it has no room for the file.
    """
    components = {name: model for name in _COMPONENTS if isinstance(model := getattr(pipe, name, None), torch.nn.Module)}
    taken = {name for model in components.values() for name in getattr(model, "peft_config", {})}
    if hotswap and adapter_name not in taken:
        raise SettingsError([f"hotswap: there is no adapter {adapter_name}, only {', '.join(sorted(taken)) or 'none'}"])
    if adapter_name in taken and not hotswap:
        raise SettingsError([f"adapter_name={adapter_name}: there is an adapter of this name: delete it, or choose another name"])
    name = adapter_name or next(f"lora_{number}" for number in range(len(taken) + 1) if f"lora_{number}" not in taken)
    layers = _layers_of(components)
    with closing(open_lora(path)) as source:
        file = read_lora(source, path, _dtype_for(source, layers))
    if file.others:
        strange = next(iter(file.others))
        raise FormatError(
            f"{path}: {len(file.others)} tensors such as {strange} cannot be applied here: pairs of factors alone can"
        )
    updates = _matched(str(path), file.updates, layers, type(pipe).__name__)
    for component, model in components.items():
        own = {layer.removeprefix(component + "."): u for layer, u in updates.items() if layer.startswith(component + ".")}
        if hotswap and (own or name in getattr(model, "peft_config", {})):
            swap_updates(model, own, name)
        elif own:
            attach_updates(model, own, name)
    pipe.set_adapters(name, weight)
    return name


def _dtype_for(source: LoraSource, layers: Mapping[str, torch.nn.Module]) -> torch.dtype | None:
    """That of all layers, where a packed file can be decoded to it at once: its factors need no scale before they are rounded."""
    kinds = {dtype_of(layer) for layer in layers.values()}
    if len(kinds) != 1 or not source.rounds_once:
        return None
    return kinds.pop()


def _layers_of(components: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """The layers that a LoRA can be for, by full name; of those that carry adapters the layer itself."""
    found: dict[str, torch.nn.Module] = {}
    for component, model in components.items():
        for name, layer in model.named_modules():
            if isinstance(layer, _KINDS) and not _is_adapter(name):
                found[f"{component}.{name.removesuffix('.base_layer')}"] = layer
    return found


def _is_adapter(name: str) -> bool:
    """Whether a module is part of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def _matched(
    path: str, updates: Mapping[str, LowRankUpdate], layers: Mapping[str, torch.nn.Module], pipeline: str
) -> dict[str, LowRankUpdate]:
    """Updates by full name of the layer, all of the size of theirs."""
    found, missing = find_layers(updates, {name: _size(layer)[0] for name, layer in layers.items()})
    if missing:
        raise FormatError(
            f"{path}: {len(missing)} of {len(updates)} modules have no layer in this {pipeline}, such as {missing[0]}: "
            "take the model that the LoRA was trained on"
        )
    for name, update in found.items():
        size = len(update.up), update.down_matrix.shape[1]
        if size != _size(layers[name]):
            here, there = (" x ".join(map(str, pair)) for pair in (size, _size(layers[name])))
            raise FormatError(f"{path}: {name}: is {here}, the layer of this {pipeline} {there}: take the model it was trained on")
    return found


def _size(layer: Any) -> tuple[int, int]:
    """(out, in * kernel)."""
    if isinstance(layer, torch.nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.weight[0].numel()
