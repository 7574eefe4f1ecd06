"""Stores the weights of linear and convolution layers packed, in place, and decodes them in forward and again in backward.

The layer stays the object and the class it was, so what finds layers by class or wraps their `forward` finds them as before. Its
`weight` becomes the codes: integers, which no `.to(dtype)` casts, that move between devices as any weight does (block swapping
exchanges `layer.weight.data`). Scales lie beside it as the bits of float32 in int32 buffers, safe from casts for the same reason.
None of them is in a state_dict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_input

from ..errors import LoraCompressError
from .weights import WEIGHT_FORMATS

__all__ = ["FrozenBytes", "dequantized_weight", "is_frozen", "quantize_frozen", "weight_bytes"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FEW_CHANNELS = 16  # layers at the edge of a model, to and from latents: no bytes to speak of, and every error of theirs is seen


@dataclass(frozen=True)
class FrozenBytes:
    """What was quantized: layers, and bytes of all weights of the model before (in fp16) and after."""

    layers: int
    before: int
    after: int

    @property
    def saved(self) -> float:
        """The share of the bytes that is gone."""
        return 1 - self.after / self.before if self.before else 0.0


def quantize_frozen(
    model: nn.Module,
    name: str,
    device: torch.device | None = None,
    keep: Callable[[str], bool] = lambda path: False,
) -> FrozenBytes:
    """Pack the weights of all Linear and Conv2d layers of `model`, in place, one at a time; biases and all else stay.

    Left as they are: layers with 16 channels or fewer on a side, weights that are shared between modules, padding other than
    zeros, and what was packed before. A subclass of Linear or Conv2d is taken for something that packs its weight itself.

    Args:
        name: int8, nf4 or fp8, a key of WEIGHT_FORMATS. Convolutions are stored in int8 where it is nf4.
        device: where to quantize; where the weight is, if None. The codes go back to where the weight was.
        keep: paths of further layers to leave as they are.

    Raises:
        LoraCompressError: a weight is not fp16, bf16 or fp32, or not finite.
    """
    before = 2 * sum(parameter.numel() for parameter in _unique(model.parameters()))
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values() if tensor is not None)
    layers = 0
    for path, module in model.named_modules():
        if not _packable(module) or owners[id(module.weight)] > 1 or keep(path):
            continue
        convolution = isinstance(module, nn.Conv2d) and not WEIGHT_FORMATS[name].convolutions
        _pack_layer(path, module, "int8" if convolution else name, device)
        layers += 1
    return FrozenBytes(layers, before, weight_bytes(model))


def is_frozen(module: nn.Module) -> bool:
    """Whether its weight is packed."""
    return hasattr(module, "frozen_format")


def dequantized_weight(module: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of a packed layer as its forward uses it, in the shape that it had."""
    parts = [module.weight, *(getattr(module, f"weight_scale_{index}") for index in range(1, module.frozen_parts))]
    floats = (part.view(torch.float32) if part.dtype == torch.int32 else part for part in parts)
    return WEIGHT_FORMATS[module.frozen_format].unpack(tuple(floats), module.frozen_shape, dtype)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, in whatever they are stored."""
    return sum(tensor.nbytes for tensor in _unique([*model.parameters(), *model.buffers()]))


def _packable(module: Any) -> bool:
    if type(module) not in (nn.Linear, nn.Conv2d) or is_frozen(module):
        return False
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return False
    return min(module.weight.shape[:2]) > _FEW_CHANNELS


def _pack_layer(path: str, module: Any, name: str, device: torch.device | None) -> None:
    weight = module.weight.detach()
    if weight.dtype not in _FLOATS:
        raise LoraCompressError(f"{path}: its weight is {weight.dtype}, only fp16, bf16 and fp32 can be quantized to {name}")
    rows = weight.flatten(1).to(device or weight.device, torch.float16).contiguous()
    if not rows.is_meta and not rows.isfinite().all():
        raise LoraCompressError(f"{path}: its weight is not finite in fp16 and cannot be quantized to {name}")
    parts = WEIGHT_FORMATS[name].pack(rows)
    del module.weight
    codes, *scales = (part.to(weight.device) for part in parts)
    module.register_buffer("weight", codes.view(weight.shape) if codes.numel() == weight.numel() else codes, persistent=False)
    for index, scale in enumerate(scales, start=1):
        bits = scale.view(torch.int32) if scale.is_floating_point() else scale
        module.register_buffer(f"weight_scale_{index}", bits, persistent=False)
    module.frozen_format, module.frozen_parts, module.frozen_shape = name, len(parts), weight.shape
    module.requires_grad_(False)
    module.forward = MethodType(_forward, module)


def _forward(self: Any, x: Tensor) -> Tensor:
    """The layer's product, in the type that the float layer's would have: that of autocast, or of `x`."""
    kind = x.device.type
    return _Product.apply(x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x, self)


class _Product(torch.autograd.Function):
    """x -> layer(x). What is kept for backward is the layer, not its decoded weight; only `x` gets a gradient.

    The codes are read from the layer when they are needed: block swapping moves them in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        weight = dequantized_weight(layer, x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return layer._conv_forward(x, weight, bias) if len(weight.shape) == 4 else functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        weight = dequantized_weight(layer, grad.dtype)
        if len(weight.shape) == 2:
            return grad @ weight, None
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return conv2d_input(ctx.shape, weight, grad, *geometry), None


def _unique(tensors: Any) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
