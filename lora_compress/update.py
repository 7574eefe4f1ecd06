"""A LoRA module as mathematics: the low-rank update dW = (alpha / r) * up @ down of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FormatError

__all__ = ["LowRankUpdate", "relative_error", "squared_error"]


@dataclass(frozen=True)
class LowRankUpdate:
    """The low-rank update of one layer, dW = (alpha / r) * up @ down.

    Args:
        down: (r, in) for a linear layer, (r, in, *kernel) for a convolution.
        up: (out, r), or (out, r, 1, ...) for a convolution.
        alpha: the scale numerator; the update is scaled by alpha / r.

    Raises:
        FormatError: the shapes do not fit together.
    """

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) < 2 or len(up) != len(down) or up[1] != down[0] or any(size != 1 for size in up[2:]):
            raise FormatError(f"lora_down {down} and lora_up {up} do not form one update (rank first, then rank second, 1x1 up)")

    @property
    def rank(self) -> int:
        """Number of rows of `down`, r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank if self.rank else 0.0

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution, () for a linear layer."""
        return tuple(self.down.shape[2:])

    @property
    def down_matrix(self) -> Tensor:
        """`down` as a matrix, (r, in * kernel)."""
        return self.down.flatten(1)

    @property
    def up_matrix(self) -> Tensor:
        """`up` as a matrix, (out, r)."""
        return self.up.flatten(1)

    @property
    def numel(self) -> int:
        """Stored weights of both factors."""
        return self.down.numel() + self.up.numel()

    @classmethod
    def from_matrices(cls, down: Tensor, up: Tensor, alpha: float, kernel: tuple[int, ...] = ()) -> LowRankUpdate:
        """Build from `down: (r, in * kernel)` and `up: (out, r)`, giving a convolution its shapes back."""
        if kernel:
            channels = down.shape[1] // torch.Size(kernel).numel()
            down = down.reshape(down.shape[0], channels, *kernel)
            up = up.reshape(*up.shape, *([1] * len(kernel)))
        return cls(down, up, alpha)

    def dense(self) -> Tensor:
        """dW itself in float64, (out, in * kernel): for tests and small layers only."""
        return self.up_matrix.double() @ self.down_matrix.double() * self.scale


def squared_error(reference: LowRankUpdate, other: LowRankUpdate | None) -> tuple[float, float]:
    """||dW - dW'||_F^2 and ||dW||_F^2 in float64, from the factors: ||U V||_F^2 = sum((U^T U) * (V V^T)).

    `other` None stands for a removed module, dW' = 0.
    """
    up = reference.up_matrix.double() * reference.scale
    down = reference.down_matrix.double()
    norm = _gram_norm(up, down)
    if other is None:
        return norm, norm
    up = torch.cat([up, -other.scale * other.up_matrix.to(up)], dim=1)  # (out, r + r')
    down = torch.cat([down, other.down_matrix.to(down)], dim=0)  # (r + r', in * kernel)
    return _gram_norm(up, down), norm


def relative_error(squared: float, norm: float) -> float:
    """sqrt(squared / norm): 0 where nothing was lost, also of an update that is zero throughout."""
    if squared == 0.0:
        return 0.0
    return (squared / norm) ** 0.5 if norm > 0.0 else float("inf")


def _gram_norm(up: Tensor, down: Tensor) -> float:
    return max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)
