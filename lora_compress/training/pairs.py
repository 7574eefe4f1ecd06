"""The pairs of layers that a session works on: found in a network by their names, sd-scripts' or PEFT's, or given by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError
from ..update import LowRankUpdate

__all__ = ["Pair", "find_pairs"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers that make up one low-rank update, dW = scale * up.weight @ down.weight.

    Args:
        name: what the session knows it by.
        down: nn.Linear or nn.Conv1d to 3d, weight (r, in, *kernel).
        up: likewise, weight (out, r, 1, ...).
        scale: alpha / r, which the host multiplies by.
        module: the module of the file that it belongs to, one pair or several side by side; `name` unless given.

    Raises:
        FormatError: layers of other kinds, with a bias, or that do not fit each other.
    """

    name: str
    down: nn.Module
    up: nn.Module
    scale: float
    module: str = ""

    def __post_init__(self) -> None:
        for layer in (self.down, self.up):
            if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)) or layer.bias is not None or getattr(layer, "groups", 1) != 1:
                raise FormatError(f"{self.name}: a {type(layer).__name__} is no factor: nn.Linear or nn.ConvNd without a bias is")
        self.update()
        object.__setattr__(self, "module", self.module or self.name)

    @property
    def rank(self) -> int:
        """r."""
        return self.weights[0].shape[0]

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The parameters of down and up."""
        return live_weight(self.down), live_weight(self.up)

    @property
    def row_sizes(self) -> tuple[int, int]:
        """Weights of a component in down and in up."""
        down, up = self.weights
        return down[0].numel(), up.shape[0]

    def rows(self, side: int, tensor: Tensor) -> Tensor:
        """A weight-shaped tensor of down (side 0) or up (1) by components, to be read: (r, in * kernel) or (r, out)."""
        return tensor.flatten(1) if side == 0 else tensor.flatten(1).T

    def live_rows(self) -> tuple[Tensor, Tensor]:
        """The live weights by components, detached: (r, in * kernel) and (r, out)."""
        down, up = self.weights
        return self.rows(0, down.detach()), self.rows(1, up.detach())

    def mix(self, side: int, tensor: Tensor, map_: Tensor) -> None:
        """Replace the components of a weight-shaped tensor by mixtures `map_ (r, r)` of them, computed in float64."""
        tensor.copy_(self.shaped(side, map_.to(tensor.device) @ self.rows(side, tensor).double()))

    def pick(self, side: int, tensor: Tensor, chosen: Tensor) -> Tensor:
        """A copy of the components `chosen: (r,)` of a weight-shaped tensor."""
        return tensor[chosen] if side == 0 else tensor[:, chosen]

    def fill(self, side: int, tensor: Tensor, chosen: Tensor, value: float | Tensor) -> None:
        """Set the components `chosen: (r,)` of a weight-shaped tensor, to what `pick` gave or to a number."""
        tensor[chosen if side == 0 else (slice(None), chosen)] = value

    def shaped(self, side: int, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return (rows if side == 0 else rows.T).reshape(self.weights[side].shape)

    def update(self) -> LowRankUpdate:
        """The live weights, detached."""
        down, up = self.weights
        return LowRankUpdate(down.detach(), up.detach(), self.scale * self.rank)


def find_pairs(network: nn.Module, adapter: str = "default") -> dict[str, Pair]:
    """The pairs of a network: modules with lora_down and lora_up (sd-scripts), or with lora_A and lora_B (PEFT, `adapter`).

    A module is called by its lora_name if it has one, else by its path. Under split_qkv, where lora_down and lora_up are lists,
    pair i of a module is called <name>.<i>.
    """
    return {pair.name: pair for path, module in network.named_modules() for pair in _pairs_of(path, module, adapter)}


def _pairs_of(path: str, module: Any, adapter: str) -> Iterator[Pair]:
    if hasattr(module, "lora_down") and hasattr(module, "lora_up"):
        name, down, up, scale = getattr(module, "lora_name", path), module.lora_down, module.lora_up, float(module.scale)
        if isinstance(down, nn.ModuleList):
            for i, (own_down, own_up) in enumerate(zip(down, up, strict=True)):
                yield Pair(f"{name}.{i}", own_down, own_up, scale, name)
        else:
            yield Pair(name, down, up, scale)
    elif isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and adapter in module.lora_A:
        yield Pair(path, module.lora_A[adapter], module.lora_B[adapter], float(module.scaling[adapter]))


def is_convolution(layer: nn.Module) -> bool:
    """Whether a factor is a convolution."""
    return isinstance(layer, _CONVOLUTIONS)


def live_weight(layer: nn.Module) -> nn.Parameter:
    """What is trained, whatever a session lets `layer.weight` be."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight
