"""Forge: a collection of its LoRA loader and a kind of patch (backend/patcher/lora.py, extra_weight_calculators)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from backend.patcher import lora as host

import networks

from .guard import applied_or_error, recorded
from .opening import MODULE, opening

__all__ = ["register"]

_KIND = "lora_compress"


class PackedCollection:
    """Takes the packed modules of a file for itself and leaves the rest to the collections of the host."""

    def load_lora(self, lora: Mapping[str, Any], to_load: Mapping[str, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
        """The patches by the keys of the model, and what is left of the file, for the host's next model."""
        found, used = {}, set()
        for name, key in to_load.items():
            if (packed := f"{name}.{MODULE}") in lora:
                dora = f"{name}.dora_scale"
                found[key] = (_KIND, (lora[packed], lora.get(dora)))
                used |= {packed, dora}
        left = {key: value for key, value in lora.items() if key not in used}
        theirs = next(known for known in host.lora_collection_priority if known is not self and hasattr(known, "load_lora"))
        patches, left = theirs.load_lora(left, to_load)
        return patches | found, left


def add_update(weight: torch.Tensor, strength: float, patch: tuple[Any, torch.Tensor | None]) -> torch.Tensor:
    """`weight` with the update added in place, as the host adds one of its own; it may be a part of a larger weight."""
    module, dora_scale = patch
    update = module.decode()
    ours = (strength, ("lora", (update.up, update.down, update.alpha, None, dora_scale)), 1.0, None, None)
    return weight.copy_(host.merge_lora_to_weight([ours], weight, computation_dtype=weight.dtype))


def register() -> None:
    """Once, however many copies of the extension are installed."""
    if _KIND not in host.extra_weight_calculators:
        host.extra_weight_calculators[_KIND] = add_update
        host.lora_collection_priority.insert(0, PackedCollection())
        networks.load_lora_state_dict = recorded(opening(networks.load_lora_state_dict))
        networks.load_lora_for_models = applied_or_error(networks.load_lora_for_models)
