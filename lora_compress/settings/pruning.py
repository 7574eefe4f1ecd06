"""Which components, channels and modules survive, whatever the file then weighs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["PruningSettings"]


@dataclass(frozen=True)
class PruningSettings:
    """Which components sigma_i u_i v_i^T of the updates are kept; `pruning.select_ranks` has the formulas."""

    rank_ratio: float = field(default=1.0, metadata={"help": "components kept / all components of the file, in (0, 1]"})
    norm_threshold: float = field(default=0.0, metadata={"help": "effective singular value below which a component goes, >= 0"})
    min_rank: int = field(default=4, metadata={"help": "components that every module keeps at least, >= 0"})

    @property
    def enabled(self) -> bool:
        """Whether anything can be removed."""
        return self.rank_ratio < 1.0 or self.norm_threshold > 0.0

    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = []
        if not 0.0 < self.rank_ratio <= 1.0:
            found.append(f"rank_ratio={self.rank_ratio:g}: must lie in (0, 1]")
        if not 0.0 <= self.norm_threshold < math.inf:
            found.append(f"norm_threshold={self.norm_threshold:g}: must be 0 or more")
        if self.min_rank < 0:
            found.append(f"min_rank={self.min_rank}: must be 0 or more")
        return found
