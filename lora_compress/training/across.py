"""Data parallel training: what ranks must agree on."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

__all__ = ["average_over_ranks", "take_from_first_rank"]


def average_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over all ranks, in place; nothing where one process trains."""
    if _parallel():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def take_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of rank 0, in place; nothing where one process trains."""
    if _parallel():
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.broadcast(whole, 0)
            if whole is not tensor:
                tensor.copy_(whole)


def _parallel() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
