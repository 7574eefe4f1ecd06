"""Puts updates onto a model as one PEFT adapter, with the rank and the scale of every layer as they are.

diffusers guesses the configuration of an adapter from its tensors, and some of its releases take the most frequent rank or alpha
for all layers. Here the configuration is written out: scales are in the factors, so alpha = rank everywhere, and every layer's
rank is told by its full name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError
from ..update import LowRankUpdate

__all__ = ["attach_updates", "balanced_factors", "dtype_of", "peft_misfit", "swap_updates"]


def attach_updates(model: Any, updates: Mapping[str, LowRankUpdate], adapter_name: str) -> None:
    """Add an adapter to a model of diffusers or transformers and make it the active one.

    Args:
        model: the U-Net, the transformer or a text encoder.
        updates: by the name of the layer in the model.
        adapter_name: no adapter of the model has it.

    Raises:
        SettingsError: PEFT does not fit a quantization library that is installed.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    ranks: dict[int, list[str]] = {}
    for name, update in updates.items():
        ranks.setdefault(update.rank, []).append(name)
    most = max(ranks, key=lambda rank: len(ranks[rank]))
    # One pattern for each rank: PEFT tries every pattern on every layer.
    pattern = {f"^(?:{'|'.join(map(re.escape, names))})": rank for rank, names in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_pattern(updates, [name for name, _ in model.named_modules() if name not in updates]),
        init_lora_weights=False,  # they are about to come
        bias="none",
    )
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        layer = model.get_submodule(name)
        layer = getattr(layer, "base_layer", layer)  # it may carry adapters already
        down, up = balanced_factors(update, dtype_of(layer), layer)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is what is wanted
        try:
            inject_adapter_in_model(config, model, adapter_name=adapter_name, low_cpu_mem_usage=True)
        except ImportError as error:  # PEFT asks every quantization library that is installed about every layer
            raise peft_misfit(error) from None
    model.peft_config[adapter_name].target_modules = set(updates)
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name, low_cpu_mem_usage=True)
    model._hf_peft_config_loaded = True  # what diffusers and transformers ask before they look for adapters


def peft_misfit(error: Exception) -> SettingsError:
    """What a user is told where PEFT fails on a library for quantized weights, of which it knows another release.

    PEFT asks all of these libraries that are installed about every layer, whether the model uses them or not.
    """
    import peft

    remedy = "upgrade PEFT, or uninstall that library if no model of yours needs it"
    return SettingsError([f"PEFT {peft.__version__} and an installed library do not fit ({error}): {remedy}"])


def _pattern(names: Iterable[str], others: Iterable[str]) -> str:
    """A regular expression for these names of layers among the others, by their ends where these tell them apart.

    PEFT tries whatever it is given on every layer, and a list of names takes it longer than all the rest.
    """
    taken = {end for name in others for end in _ends(name)}
    ends = {name: next((end for end in _ends(name) if end not in taken), None) for name in names}
    told = "|".join(map(re.escape, sorted({end for end in ends.values() if end is not None})))
    whole = [re.escape(name) for name, end in ends.items() if end is None]  # others end in it
    return "|".join([rf"(?:.*\.)?(?:{told})", *whole] if told else whole)


def _ends(name: str) -> Iterator[str]:
    """Of its dotted parts, the shortest first: c, b.c, a.b.c."""
    parts = name.split(".")
    return (".".join(parts[-count:]) for count in range(1, len(parts) + 1))


def swap_updates(model: Any, updates: Mapping[str, LowRankUpdate], adapter_name: str) -> None:
    """Put updates in the place of those of an adapter: tensors keep place and shape, so that a compiled model stays compiled.

    Components that an update has fewer of than the adapter has room for are zeros, and so are layers that it does not change.

    Raises:
        SettingsError: a layer without the adapter, one with too little room, or the adapter is fused; nothing was changed then.
    """
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if adapter_name in getattr(m, "lora_A", {})}
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise SettingsError([f"{adapter_name} is fused: call unfuse_lora before it is swapped"])
    for name, update in updates.items():
        room = layers[name].r[adapter_name] if name in layers else 0
        if update.rank > room:
            raise SettingsError(
                [f"{name} has rank {update.rank}, {adapter_name} has room for {room}: load the LoRA with the largest ranks first"]
            )
    with torch.no_grad():
        for name, layer in layers.items():
            down, up = layer.lora_A[adapter_name].weight.zero_(), layer.lora_B[adapter_name].weight.zero_()
            if name in updates:
                new_down, new_up = balanced_factors(updates[name], down.dtype, layer.base_layer)
                down[: len(new_down)], up[:, : len(new_down)] = new_down, new_up


def balanced_factors(update: LowRankUpdate, dtype: torch.dtype, layer: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """down (r, in, *kernel) and up (out, r, ...) in the shape of the layer's weight, the scale in both, the sign in `up`."""
    gain = abs(update.scale) ** 0.5
    down, up = update.down, update.up
    if update.scale != 1.0:
        down, up = down.float() * gain, up.float() * (gain if update.scale >= 0 else -gain)
    kernel = getattr(layer, "kernel_size", ())
    if kernel:
        down, up = down.reshape(update.rank, -1, *kernel), up.reshape(-1, update.rank, *[1] * len(kernel))
    else:
        down, up = down.flatten(1), up.flatten(1)
    return down.to(dtype).contiguous(), up.to(dtype).contiguous()


def dtype_of(layer: torch.nn.Module) -> torch.dtype:
    """What the layer computes in: of its weight, or as a layer of integers tells it."""
    weight: Any = layer.weight
    if weight.dtype.is_floating_point and weight.element_size() > 1:
        return weight.dtype
    return getattr(layer, "compute_dtype", None) or torch.float32
