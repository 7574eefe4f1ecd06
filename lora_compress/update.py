"""A LoRA module as mathematics: the low-rank update dW = (alpha / r) * up @ down of one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import FormatError

__all__ = ["LowRankUpdate", "ModuleShape", "difference", "differences", "relative_error", "require_range", "squared_error"]


_PLAIN_RANGE = 1e12  # entries beyond it, or under its inverse, are scaled before they are squared in float32
_LARGEST_EXPONENT = 140  # of ten; twice as much, and sums over the weights of a layer, fit into float64


@dataclass(frozen=True)
class LowRankUpdate:
    """The low-rank update of one layer, dW = (alpha / r) * up @ down.

    Example:
        >>> update = LowRankUpdate(down=torch.eye(2, 3), up=torch.eye(4, 2), alpha=1.0)
        >>> update.rank, update.scale, update.dense().shape
        (2, 0.5, torch.Size([4, 3]))

    Args:
        down: (r, in) for a linear layer, (r, in, *kernel) for a convolution.
        up: (out, r), or (out, r, 1, ...) for a convolution.
        alpha: the scale numerator; the update is scaled by alpha / r.
        rest: squared Frobenius norm of what the layer's change has beside this, orthogonal to it: of a large full difference
            only the strongest components are read. What is made of the update has lost that too.

    Raises:
        FormatError: the shapes do not fit together.
    """

    down: Tensor
    up: Tensor
    alpha: float
    rest: float = 0.0

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


class ModuleShape(NamedTuple):
    """Size of one update.

    Args:
        outputs: rows of dW.
        inputs: input features, or channels of a convolution.
        kernel: kernel size of a convolution, () for a linear layer.
        rank: of the update. Of a module that is converted (LoHa, LoKr, full weights) it is known only when the module is read:
            this is its upper bound.
    """

    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    rank: int


def require_range(update: LowRankUpdate) -> None:
    """Refuse an update whose square has no number in float64, so that its norm would come out as 0 or infinity.

    Factors in float32 and narrower types never come that far, whatever their weights; the scale alone may.

    Raises:
        FormatError: a factor in float64, or the product of the largest weights of both with the scale, is beyond 1e-140 to 1e140.
    """
    if torch.float64 not in (update.down.dtype, update.up.dtype) and 1e-40 < abs(update.scale) < 1e40:
        return
    peaks = [float(factor.double().abs().amax()) if factor.numel() else 0.0 for factor in (update.down, update.up)]
    if not all(0.0 < value < math.inf for value in (*peaks, abs(update.scale))):
        return  # an update of zeros, or what is refused for NaN or infinity
    exponents = [math.log10(value) for value in (*peaks, abs(update.scale))]
    for what, exponent in (("a factor", exponents[0]), ("a factor", exponents[1]), ("the update", sum(exponents))):
        if abs(exponent) > _LARGEST_EXPONENT:
            found = f"{what} has weights of about 1e{exponent:+.0f}, allowed: 1e-{_LARGEST_EXPONENT} to 1e+{_LARGEST_EXPONENT}"
            raise FormatError(
                f"{found}: squares of others leave the range of float64, and no training gives them: get the file again"
            )


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
    peaks = [_peak(rows) for rows in (down, up, other_down, other_up)]
    if any(bool(((peak > 0) & ((peak < 1 / _PLAIN_RANGE) | (peak > _PLAIN_RANGE))).any()) for peak in peaks):
        return _scaled_differences(down, up, other_down, other_up, peaks)
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


def _scaled_differences(down: Tensor, up: Tensor, other_down: Tensor, other_up: Tensor, peaks: Sequence[Tensor]) -> Tensor:
    """`differences` of rows whose squares would overflow or vanish in float32: each is brought near 1 by a power of two first."""
    powers = [torch.where(peak > 0, torch.exp2(torch.where(peak > 0, peak, 1.0).log2().floor()), 1.0) for peak in peaks]
    down, up, other_down, other_up = (
        rows.double() / power for rows, power in zip((down, up, other_down, other_up), powers, strict=True)
    )
    gain = powers[0] * powers[1]
    own = powers[2] * powers[3] / gain  # of the other update beside the first one
    own = torch.where((peaks[2] > 0) & (peaks[3] > 0), own, 1.0)
    return differences(down, up, other_down * own.sqrt(), other_up * own.sqrt()) * gain.flatten().square()


def _peak(rows: Tensor) -> Tensor:
    """Largest absolute value, (b, 1, 1), float64."""
    if not rows.numel():
        return rows.new_zeros(len(rows), 1, 1, dtype=torch.float64)
    return rows.abs().amax(dim=(1, 2), keepdim=True).double()


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
