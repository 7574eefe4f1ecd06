"""Which components, channels and modules survive, whatever the file then weighs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["DYNAMIC_METHODS", "PruningSettings"]

DYNAMIC_METHODS = {
    "sv_ratio": "dynamic_method=sv_ratio keeps what is above the largest / dynamic_param: 1 or more, 5 to 20 is usual",
    "sv_fro": "dynamic_method=sv_fro keeps this share of the Frobenius norm: in (0, 1], 0.9 to 0.99 is usual",
    "sv_cumulative": "dynamic_method=sv_cumulative keeps this share of the sum of singular values: in (0, 1], 0.7 to 0.95 is usual",
    "energy": "dynamic_method=energy keeps this share of the squared norm: in (0, 1], 0.9 to 0.99 is usual",
    "knee": "dynamic_method=knee takes a sensitivity: 0 or more, default 1, larger wants a sharper knee",
}
_TRAINED_MIN_RANK = 4


@dataclass(frozen=True)
class PruningSettings:
    """Which components sigma_i u_i v_i^T of the updates are kept; `pruning.select_ranks` has the formulas."""

    rank_ratio: float = field(default=1.0, metadata={"help": "components kept / all components of the file, in (0, 1]"})
    norm_threshold: float = field(default=0.0, metadata={"help": "effective singular value below which a component goes, >= 0"})
    min_rank: int | None = field(
        default=None,
        metadata={"help": "components that every module keeps at least, >= 0; default 4, or 1 with new_rank or dynamic_method"},
    )
    new_rank: int | None = field(default=None, metadata={"help": "components that a module keeps at most, >= 1"})
    new_conv_rank: int | None = field(
        default=None, metadata={"help": "the same for kernels larger than 1x1, >= 1; default new_rank"}
    )
    dynamic_method: str | None = field(
        default=None, metadata={"help": f"a rank for each module by its own spectrum: {', '.join(DYNAMIC_METHODS)}"}
    )
    dynamic_param: float | None = field(default=None, metadata={"help": "what dynamic_method aims at: a ratio or a share kept"})
    layer_threshold: float = field(
        default=0.0, metadata={"help": "share of the file's squared norm below which a whole module goes, in [0, 1)"}
    )
    channel_threshold: float = field(
        default=0.0,
        metadata={"help": "share of the layer's RMS channel norm below which an input or output channel goes, in [0, 1)"},
    )

    @property
    def enabled(self) -> bool:
        """Whether anything can be removed."""
        thresholds = (self.norm_threshold, self.layer_threshold, self.channel_threshold)
        return self.rank_ratio < 1.0 or any(value > 0.0 for value in thresholds) or self._by_module

    @property
    def rank_floor(self) -> int:
        """min_rank, or its default: 4 where the whole file is ranked at once, 1 where each module has a rank of its own."""
        if self.min_rank is not None:
            return self.min_rank
        return 1 if self._by_module else _TRAINED_MIN_RANK

    @property
    def _by_module(self) -> bool:
        return self.new_rank is not None or self.new_conv_rank is not None or self.dynamic_method is not None

    def rank_cap(self, kernel: tuple[int, ...] = ()) -> int | None:
        """The most components that a module of this kernel keeps; None where nothing limits them.

        new_conv_rank is for kernels larger than 1x1, as the help of sd-scripts' networks/resize_lora.py says ("Conv2d 3x3");
        its code takes it for 1x1 convolutions too.
        """
        large = any(size > 1 for size in kernel)
        return self.new_conv_rank if large and self.new_conv_rank is not None else self.new_rank

    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = []
        if not 0.0 < self.rank_ratio <= 1.0:
            found.append(f"rank_ratio={self.rank_ratio:g}: must lie in (0, 1]")
        if not 0.0 <= self.norm_threshold < math.inf:
            found.append(f"norm_threshold={self.norm_threshold:g}: must be 0 or more")
        if self.min_rank is not None and self.min_rank < 0:
            found.append(f"min_rank={self.min_rank}: must be 0 or more")
        for name in ("layer_threshold", "channel_threshold"):
            if not 0.0 <= getattr(self, name) < 1.0:
                found.append(f"{name}={getattr(self, name):g}: must lie in [0, 1)")
        return found + self._rank_problems() + self._dynamic_problems()

    def _rank_problems(self) -> list[str]:
        found = []
        for name in ("new_rank", "new_conv_rank"):
            cap = getattr(self, name)
            if cap is not None and cap < 1:
                found.append(f"{name}={cap}: must be 1 or more")
            elif cap is not None and self.min_rank is not None and self.min_rank > cap:
                found.append(f"{name}={cap} and min_rank={self.min_rank} contradict each other: make min_rank {cap} or less")
        return found

    def _dynamic_problems(self) -> list[str]:
        method, param = self.dynamic_method, self.dynamic_param
        if method is None:
            given = f"{param:g}" if param is not None else ""
            return [f"dynamic_param={given}: no dynamic_method uses it: give one or remove it"] if given else []
        if method not in DYNAMIC_METHODS:
            return [f"dynamic_method={method}: must be one of {', '.join(DYNAMIC_METHODS)}"]
        found = []
        if param is None and method != "knee":
            found.append(f"dynamic_param=None: is missing; {DYNAMIC_METHODS[method]}")
        elif param is not None and not _allows(method, param):
            found.append(f"dynamic_param={param:g}: {DYNAMIC_METHODS[method]}")
        if self.rank_ratio < 1.0:
            found.append(f"dynamic_method={method} and rank_ratio={self.rank_ratio:g} are two criteria for the ranks: give one")
        return found


def _allows(method: str, param: float) -> bool:
    if method == "sv_ratio":
        return 1.0 <= param < math.inf
    if method == "knee":
        return 0.0 <= param < math.inf
    return 0.0 < param <= 1.0
