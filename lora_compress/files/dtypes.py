"""The number types of safetensors files, and the record of what a header says about one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DTYPES", "DTYPE_NAMES", "TensorSpec"]

# safetensors' own writer orders the tensors of a file by type, the last of these first. Hashes of the data depend on that order.
DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
# What is read: complex numbers too, because a reader must be able to say which tensor holds them.
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {"C64": torch.complex64}


@dataclass(frozen=True)
class TensorSpec:
    """The type and the shape of a tensor, without its numbers.

    Example:
        >>> spec = TensorSpec(torch.float16, (4, 320))
        >>> spec.numel, spec.nbytes
        (1280, 2560)
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Return the type and the shape of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data in a file."""
        return self.numel * self.dtype.itemsize
