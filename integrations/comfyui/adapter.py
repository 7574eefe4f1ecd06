"""The weight adapter: for each layer of a model, its module in a packed file, decoded when ComfyUI computes with it."""

from __future__ import annotations

from collections.abc import Mapping, MutableSet
from typing import Any

import comfy.weight_adapter
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from lora_compress.packed.file import INDEX_KEY, PAYLOAD_KEY
from lora_compress.packed.in_memory import PackedModule, packed_layers

__all__ = ["PackedAdapter", "register"]

_BYPASS = ("multiplier", "shape", "is_conv", "conv_dim", "kernel_size", "in_channels", "out_channels", "kw_dict")


class PackedAdapter(WeightAdapterBase):
    """The update of one layer, coded until ComfyUI computes with it.

    What is computed is what ComfyUI's own adapter computes from the decoded factors: DoRA, strengths, offsets into fused layers
    and quantized base models are its matter.

    Args:
        loaded_keys: keys of the file that are accounted for.
        weights: the module and its dora_scale or None. The module is no tensor, so that ComfyUI neither moves nor casts its codes.
    """

    name = "lora_compress"

    def __init__(self, loaded_keys: set[str], weights: tuple[PackedModule, torch.Tensor | None]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights
        self._in_bypass: tuple[torch.Tensor, torch.Tensor, float] | None = None

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
        modules = packed_layers(lora)
        return cls(keys, (modules[x], dora_scale)) if x in modules else None

    def calculate_weight(self, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`weight` with the update added, as ComfyUI's LoRAAdapter does it."""
        return self._decoded().calculate_weight(weight, *args, **kwargs)

    def h(self, x: torch.Tensor, base_out: torch.Tensor) -> torch.Tensor:
        """up (down x) alpha / rank; the factors stay decoded, for bypass computes this at every step."""
        if self._in_bypass is None:
            update = self.weights[0].decode()
            self._in_bypass = update.up.to(x), update.down.to(x), update.alpha
        up, down, alpha = self._in_bypass
        lora = LoRAAdapter(self.loaded_keys, (up.to(x), down.to(x), alpha, None, None, None))
        for attribute in _BYPASS:  # what ComfyUI tells of the layer
            if hasattr(self, attribute):
                setattr(lora, attribute, getattr(self, attribute))
        return lora.h(x, base_out)

    def _decoded(self) -> LoRAAdapter:
        module, dora_scale = self.weights
        update = module.decode()
        return LoRAAdapter(self.loaded_keys, (update.up, update.down, update.alpha, None, dora_scale, None))


def register() -> None:
    """Make ComfyUI ask this adapter too; once, however many copies of the plug-in are installed."""
    adapters = comfy.weight_adapter.adapters
    if all(known.__name__ != PackedAdapter.__name__ for known in adapters):
        adapters.append(PackedAdapter)
