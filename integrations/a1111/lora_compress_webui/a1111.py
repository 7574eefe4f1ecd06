"""AUTOMATIC1111: a type of module beside those of its Lora extension (extensions-builtin/Lora/networks.py, module_types)."""

from __future__ import annotations

import network
import network_lora
import torch
from modules import sd_models

import networks

from .guard import recorded
from .opening import MODULE, opening

__all__ = ["register"]


class PackedModule(network.NetworkModule):
    """One coded module. What is computed is what the host's own LoRA module computes from the decoded factors."""

    def __init__(self, net: network.Network, weights: network.NetworkWeights) -> None:
        super().__init__(net, weights)
        self._weights = weights
        self._forward: network_lora.NetworkModuleLora | None = None

    def calc_updown(self, orig_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The update of the weight; the factors are forgotten again."""
        return self._decoded().calc_updown(orig_weight)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y with the update's outputs added; the factors stay, for the host asks at every step."""
        if self._forward is None:
            self._forward = self._decoded()
        return self._forward.forward(x, y)

    def _decoded(self) -> network_lora.NetworkModuleLora:
        rest = dict(self._weights.w)
        update = rest.pop(MODULE).decode()
        rest |= {"lora_up.weight": update.up, "lora_down.weight": update.down, "alpha": torch.tensor(update.alpha)}
        return network_lora.NetworkModuleLora(self.network, self._weights._replace(w=rest))


class ModuleTypePacked(network.ModuleType):
    """Knows a packed module by its key."""

    def create_module(self, net: network.Network, weights: network.NetworkWeights) -> PackedModule | None:
        """The module, None for another one."""
        return PackedModule(net, weights) if MODULE in weights.w else None


def register() -> None:
    """Once, however many copies of the extension are installed."""
    if any(type(known).__name__ == ModuleTypePacked.__name__ for known in networks.module_types):
        return
    networks.module_types.insert(0, ModuleTypePacked())
    sd_models.read_state_dict = recorded(opening(sd_models.read_state_dict))  # the loader asks it for the tensors
