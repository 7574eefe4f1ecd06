"""split_qkv: a LoRA of its own for each of the projections that a DiT computes in one layer, saved at its full strength.

sd-scripts' modules can hold several pairs side by side, `lora_down` and `lora_up` being lists of the same length. We split them
ourselves, for its networks do it for some layers only, with widths written into the code, and save them weaker than they were
trained: the pairs become one of the summed rank, and its alpha stays what it was. A network that was split here has no split_qkv of
its own to the host: its state_dict is that of its modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_compress import SettingsError, as_kohya
from lora_compress.training import live_weight
from networks.compress_modules import live_update, pairs_of

__all__ = ["SplitNetwork", "fused_sizes", "split_network"]

_UNSUPPORTED = ("rank_dropout", "ggpo_beta", "ggpo_sigma")  # sd-scripts' modules fail in training when they are split


def split_network(network: Any, arguments: Mapping[str, Any]) -> int:
    """Split the modules over fused projections, fresh as they are from `create_network`; returns how many were.

    Raises:
        SettingsError: there are none, or an argument is given that sd-scripts' split modules cannot take.
    """
    if problems := [f"{name} cannot be used with split_qkv: remove one of the two" for name in _UNSUPPORTED if name in arguments]:
        raise SettingsError(problems)
    found = 0
    for lora in network.unet_loras:
        layer = lora.org_module
        sizes = fused_sizes(lora.lora_name, layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else ()
        if sizes:
            found += 1
            lora.split_dims = list(sizes)
            lora.lora_down = nn.ModuleList(nn.Linear(layer.in_features, lora.lora_dim, bias=False) for _ in sizes)
            lora.lora_up = nn.ModuleList(nn.Linear(lora.lora_dim, size, bias=False) for size in sizes)
            for down, up in zip(lora.lora_down, lora.lora_up, strict=True):
                nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
                nn.init.zeros_(up.weight)
    if not found:
        raise SettingsError(["split_qkv: none of the layers that are trained is a fused projection: remove it"])
    return found


def fused_sizes(name: str, inputs: int, outputs: int) -> tuple[int, ...]:
    """Outputs of the projections in the layer of a module named `name`; () if it computes one alone.

    qkv holds queries as wide as the stream, and keys and values that share the rest (fewer heads in Lumina); linear1 of the single
    blocks of FLUX and HunyuanImage has the MLP's first layer behind them.
    """
    if name.endswith("qkv"):
        shared = (outputs - inputs) // 2
        return inputs, shared, shared
    if name.endswith("linear1") and "single" in name:
        return inputs, inputs, inputs, outputs - 3 * inputs
    return ()


class SplitNetwork:
    """Goes before the host's class in a network that `split_network` has split: what the host cannot do with split modules."""

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """The host's own file, with each split module as one pair of the summed rank."""
        merged = _merged_state(self)
        self.state_dict = lambda *args, **kwargs: dict(merged)  # type: ignore[method-assign]
        try:
            super().save_weights(file, dtype, metadata)  # type: ignore[misc]
        finally:
            del self.state_dict

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm_value: float, device: Any) -> tuple[int, float, float]:
        """The host's rule for every pair: ||(alpha / r) up @ down||_F is brought down to `max_norm_value`, half in each factor.

        Returns:
            pairs that were scaled, and the mean and the largest norm afterwards.
        """
        norms, scaled = [], 0
        for lora in self.text_encoder_loras + self.unet_loras:  # type: ignore[attr-defined]
            for down, up in pairs_of(lora):
                weights = live_weight(up), live_weight(down)
                norm = float((weights[0].flatten(1).float() @ weights[1].flatten(1).float()).norm()) * abs(lora.scale)
                ratio = min(1.0, max_norm_value / norm) if norm else 1.0
                if ratio < 1.0:
                    scaled += 1
                    for weight in weights:
                        weight.mul_(ratio**0.5)
                norms.append(norm * ratio)
        return scaled, sum(norms) / len(norms), max(norms)


def _merged_state(network: Any) -> dict[str, Tensor]:
    """The network's state with the pairs of each split module as one."""
    state = dict(nn.Module.state_dict(network))
    for lora in network.text_encoder_loras + network.unet_loras:
        if len(pairs_of(lora)) > 1:
            state = {key: tensor for key, tensor in state.items() if not key.startswith(lora.lora_name + ".")}
            state |= as_kohya({lora.lora_name: live_update(lora)})
    return state
