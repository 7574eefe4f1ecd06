"""reForge: an adapter beside those of its loader (ldm_patched/modules/weight_adapter), which it has from ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping, MutableSet
from typing import Any

import ldm_patched.modules.weight_adapter as host
import torch

from lora_compress.packed.file import INDEX_KEY, PAYLOAD_KEY
from lora_compress.packed.in_memory import PackedModule, packed_layers

from .guard import recorded

__all__ = ["PackedAdapter", "register"]


class PackedAdapter(host.WeightAdapterBase):  # type: ignore[misc, name-defined]
    """The update of one layer, coded until reForge computes with it; what is computed is its own adapter's matter."""

    name = "lora_compress"

    def __init__(self, loaded_keys: set[str], weights: tuple[PackedModule, torch.Tensor | None]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def __getitem__(self, index: int) -> str:
        """What other extensions ask a patch of: its kind comes first."""
        return (self.name,)[index]

    @classmethod
    def load(
        cls,
        x: str,
        lora: Mapping[str, torch.Tensor],
        alpha: float | None,
        dora_scale: torch.Tensor | None,
        loaded_keys: MutableSet[str] | None = None,
    ) -> PackedAdapter | None:
        """The adapter of layer `x`, None where `lora` is no packed file or has no module for it."""
        if INDEX_KEY not in lora:
            return None
        keys = {INDEX_KEY, PAYLOAD_KEY}
        if loaded_keys is not None:
            loaded_keys.update(keys)
        modules = recorded(packed_layers)(lora)
        return cls(keys, (modules[x], dora_scale)) if x in modules else None

    def calculate_weight(self, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`weight` with the update added, as reForge's LoRAAdapter does it."""
        module, dora_scale = self.weights
        update = module.decode()
        theirs = host.LoRAAdapter(self.loaded_keys, (update.up, update.down, update.alpha, None, dora_scale, None))
        found: torch.Tensor = theirs.calculate_weight(weight, *args, **kwargs)
        return found


def register() -> None:
    """Once, however many copies of the extension are installed."""
    if all(known.__name__ != PackedAdapter.__name__ for known in host.adapters):
        host.adapters.append(PackedAdapter)
