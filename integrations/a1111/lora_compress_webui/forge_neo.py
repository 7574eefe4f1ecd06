"""Forge Neo: an adapter beside those of its loader (modules_forge/packages/comfy/weight_adapter), which it has from ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping, MutableSet
from typing import Any

import modules_forge.packages.comfy.weight_adapter as host
import torch

import networks
from lora_compress.packed.in_memory import PackedModule

from .guard import applied_or_error, recorded
from .opening import MODULE, opening

__all__ = ["PackedAdapter", "register"]


class PackedAdapter(host.LoRAAdapter):  # type: ignore[misc, name-defined]
    """The update of one layer. The host's own code computes with it; what it reads as `weights` is decoded each time.

    Args:
        loaded_keys: keys of the file that are accounted for.
        module: the coded module.
        dora_scale: of the layer, None without DoRA.
    """

    name = "lora_compress"

    def __init__(self, loaded_keys: set[str], module: PackedModule, dora_scale: torch.Tensor | None) -> None:
        self.loaded_keys = loaded_keys
        self._module = module
        self._dora_scale = dora_scale

    @property
    def weights(self) -> tuple[Any, ...]:
        """As LoRAAdapter has them: up, down, alpha, mid, dora_scale and reshape."""
        update = self._module.decode()
        return update.up, update.down, update.alpha, None, self._dora_scale, None

    @classmethod
    def load(
        cls,
        x: str,
        lora: Mapping[str, Any],
        alpha: float | None,
        dora_scale: torch.Tensor | None,
        loaded_keys: MutableSet[str] | None = None,
    ) -> PackedAdapter | None:
        """The adapter of layer `x`, None where the file has no packed module for it."""
        key = f"{x}.{MODULE}"
        return cls({key}, lora[key], dora_scale) if key in lora else None


def register() -> None:
    """Once, however many copies of the extension are installed."""
    if any(known.__name__ == PackedAdapter.__name__ for known in host.adapters):
        return
    host.adapters.append(PackedAdapter)
    networks.load_lora_state_dict = recorded(opening(networks.load_lora_state_dict))
    networks.load_lora_for_models = applied_or_error(networks.load_lora_for_models)
