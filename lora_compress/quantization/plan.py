"""What was decided for one module, as the strategies need it in order to encode the module."""

from __future__ import annotations

from dataclasses import dataclass

from .entropy.stages import LEAST_PLANES

__all__ = ["ModulePlan"]


@dataclass(frozen=True)
class ModulePlan:
    """What was decided for one module.

    Args:
        rank: components to keep; 0 drops the module.
        bits: per component, falling; only for strategies whose budgets are searched by COMPONENT_BITS.
        step_size: of the quantizer; only for strategies whose budgets are searched by STEP_SIZE.
        phase: of a progressive payload, eighths of octaves by which its step size is coarser than that of the file.
        planes: bit planes of a progressive payload; more would make the smallest cuts smaller and all others larger.
        left: components that are left of `rank` after coding, where that is known: a plain file needs room for no more.
    """

    rank: int
    bits: tuple[int, ...] | None = None
    step_size: float | None = None
    phase: int = 0
    planes: int = LEAST_PLANES
    left: int | None = None

    @property
    def stored(self) -> int:
        """Return the number of components that the file gets."""
        return self.rank if self.left is None else self.left
