"""A LoRA module as mathematics: the low-rank update dW = (alpha / r) * up @ down of one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FormatError

__all__ = ["LowRankUpdate", "difference", "differences", "relative_error", "squared_error"]


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
    """||dW - dW'||_F^2 and ||dW||_F^2 of any two updates of one layer, right also where they nearly agree.

    `other` None stands for a removed module, dW' = 0. With [up, -up'] = Q_u R_u and [down; down']^T = Q_d R_d the difference
    has the norm of R_u R_d^T, where what cancels has cancelled before anything is squared.
    """
    up = reference.up_matrix.double() * reference.scale
    down = reference.down_matrix.double()
    norm = _product_norm(up, down)
    if other is None:
        return norm, norm
    up = torch.cat([up, -other.scale * other.up_matrix.to(up)], dim=1)  # (out, r + r')
    down = torch.cat([down, other.down_matrix.to(down)], dim=0)  # (r + r', in * kernel)
    return _product_norm(up, down), norm


def difference(down: Tensor, up: Tensor, other_down: Tensor, other_up: Tensor) -> float:
    """`differences` of one module."""
    return float(differences(*(rows.unsqueeze(0) for rows in (down, up, other_down, other_up))))


def differences(down: Tensor, up: Tensor, other_down: Tensor, other_up: Tensor) -> Tensor:
    """||up^T down - up'^T down'||_F^2, (b,), where up has orthogonal rows, as those of balanced components are.

    Written as up^T (down - down') + (up - up')^T down' with the two brought to the same balance first, so that nothing large
    is subtracted; the norm is in inner products of the rows. The fast way for modules of one shape and what a codec made of
    them: matching rows, the first of one stand for the first of the other.

    Args:
        down: (b, k, in * kernel).
        up: (b, k, out), orthogonal rows.
        other_down: (b, k', in * kernel), k' at most k: the components beyond have been dropped.
        other_up: (b, k', out).
    """
    kept, other_down, other_up = other_down.shape[1], other_down.to(down), other_up.to(up)
    first, other = (_squares(rows[:, :1]).sum(dim=1, keepdim=True) for rows in (down, other_down))
    gain = (other / first).sqrt()  # of the other's balance; any would do but for rounding
    gain = torch.where((gain > 0.0) & (gain < math.inf), gain, 1.0).to(down)
    less_up = torch.addcmul(up[:, :kept], other_up, gain, value=-1.0)
    less_down = torch.addcmul(down[:, :kept], other_down, gain.reciprocal(), value=-1.0)
    if kept < down.shape[1]:
        less_down = torch.cat([less_down, down[:, kept:]], dim=1)
    apart = _inner(_squares(up), _squares(less_down))
    crossed = _inner((up @ less_up.mT).double(), (less_down @ other_down.mT).double() / gain)
    beside = _inner((less_up @ less_up.mT).double(), (other_down @ other_down.mT).double() / gain.square())
    return (apart + 2.0 * crossed + beside).clamp_min(0.0)


def _squares(rows: Tensor) -> Tensor:
    """Squared norms of rows, (b, k, 1), float64."""
    return rows.square().sum(dim=2, keepdim=True).double()


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Sums over the products of matrices, (b,)."""
    return (one * other).sum(dim=(1, 2))


def relative_error(squared: float, norm: float) -> float:
    """sqrt(squared / norm): 0 where nothing was lost, also of an update that is zero throughout."""
    if squared == 0.0:
        return 0.0
    return (squared / norm) ** 0.5 if norm > 0.0 else float("inf")


def _product_norm(up: Tensor, down: Tensor) -> float:
    """||up @ down||_F^2 for up (out, r) and down (r, n), both float64."""
    return float((torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T).square().sum())
