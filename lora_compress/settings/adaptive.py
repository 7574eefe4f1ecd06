"""When a training changes its own compression, by how much and within which bounds: the section [adaptive]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import SettingsError
from .parsing import parse_section

__all__ = ["ADAPTIVE_MODES", "AdaptiveSettings"]

ADAPTIVE_MODES = ("fid_gap", "fid_trend")
_LEAST_WINDOW = 3


@dataclass(frozen=True)
class AdaptiveSettings:
    """When a training relaxes or tightens its compression; `lora_compress.training.controller` has the rules.

    Raises:
        SettingsError: a value is out of range or two values contradict each other.
    """

    mode: str = field(default="fid_gap", metadata={"help": "fid_gap: keep what compression costs under max_fid_gap; "
                                                   "fid_trend: follow the slope of the validation FID"})  # fmt: skip
    metric: str = field(default="fid", metadata={"help": "the metric that is followed: fid, probe_fd, kid, ..."})
    window: int = field(default=3, metadata={"help": "fid_trend: evaluations that the slope is fitted to, >= 3"})
    relax_slope: float = field(default=0.5, metadata={"help": "fid_trend: a rise per evaluation above this relaxes; in units of "
                                                      "the same-N floor where the metric is not fid"})  # fmt: skip
    compress_slope: float = field(
        default=0.2, metadata={"help": "fid_trend: a slope within +/- this compresses; below relax_slope"}
    )
    max_fid_gap: float = field(
        default=0.05, metadata={"help": "fid_gap: (FID compressed - FID full) / FID full that is allowed, > 0"}
    )
    hysteresis: float = field(default=0.5, metadata={"help": "fid_gap: compress only under this share of max_fid_gap, in (0, 1)"})
    patience: int = field(
        default=2, metadata={"help": "fid_gap: evaluations in a row that must agree before anything changes, >= 1"}
    )
    retry_after: int = field(default=8, metadata={"help": "fid_gap: evaluations until what had cost too much is tried "
                                                  "again, doubled with each failure, >= 1"})  # fmt: skip
    relax_rank: float = field(default=0.1, metadata={"help": "added to rank_ratio when relaxing, >= 0"})
    relax_bits: float = field(default=2, metadata={"help": "added to bits when relaxing, >= 0"})
    compress_rank: float = field(default=0.05, metadata={"help": "taken from rank_ratio when compressing, >= 0"})
    compress_bits: float = field(default=2, metadata={"help": "taken from bits when compressing, >= 0"})
    min_rank_ratio: float = field(default=0.3, metadata={"help": "rank_ratio is not lowered below this, in (0, 1]"})
    max_rank_ratio: float = field(default=0.9, metadata={"help": "rank_ratio is not raised above this, in (0, 1]"})
    min_bits: float = field(default=4, metadata={"help": "bits are not lowered below this, in (0, 8]"})
    max_bits: float = field(default=8, metadata={"help": "bits are not raised above this, in (0, 8]"})

    def __post_init__(self) -> None:
        problems = [*self._range_problems(), *self._order_problems()]
        if self.mode not in ADAPTIVE_MODES:
            problems.append(f"mode={self.mode}: must be one of {', '.join(ADAPTIVE_MODES)}")
        if not self.metric:
            problems.append("metric=: must be the name of a metric, such as fid")
        if problems:
            raise SettingsError(problems, "adaptive settings")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> AdaptiveSettings:
        """Build settings from `{name: text or number}` pairs, as the section [adaptive] of a TOML file holds them.

        Raises:
            SettingsError: unknown names, values of the wrong type or range, contradictions; all of them in one error.
        """
        return parse_section(cls, values, "adaptive settings")

    def _range_problems(self) -> list[str]:
        found = []
        for name, least in (("window", _LEAST_WINDOW), ("patience", 1), ("retry_after", 1)):
            if getattr(self, name) < least:
                found.append(f"{name}={getattr(self, name)}: must be {least} or more")
        for name in ("relax_slope", "compress_slope", "relax_rank", "relax_bits", "compress_rank", "compress_bits"):
            if not 0.0 <= getattr(self, name) < math.inf:
                found.append(f"{name}={getattr(self, name):g}: must be 0 or more")
        for name, most in (("min_rank_ratio", 1.0), ("max_rank_ratio", 1.0), ("min_bits", 8.0), ("max_bits", 8.0)):
            if not 0.0 < getattr(self, name) <= most:
                found.append(f"{name}={getattr(self, name):g}: must lie in (0, {most:g}]")
        if not 0.0 < self.max_fid_gap < math.inf:
            found.append(f"max_fid_gap={self.max_fid_gap:g}: must be above 0")
        if not 0.0 < self.hysteresis < 1.0:
            found.append(f"hysteresis={self.hysteresis:g}: must lie in (0, 1)")
        return found

    def _order_problems(self) -> list[str]:
        ordered = (
            ("min_rank_ratio", "max_rank_ratio"),
            ("min_bits", "max_bits"),
            ("compress_slope", "relax_slope"),
        )
        return [
            f"{low}={getattr(self, low):g} is above {high}={getattr(self, high):g}: exchange them"
            for low, high in ordered
            if getattr(self, low) > getattr(self, high)
        ]

    def completed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a compression, and what changes of ranks and bits need, where `given` says nothing else.

        That is a rank_ratio to begin with, the most that is allowed; iterative_pruning and rank_return; qat where bits are given.
        """
        needed = {"rank_ratio": self.max_rank_ratio, "iterative_pruning": True, "rank_return": True}
        return {**needed, **({"qat": True} if float(given.get("bits", 16)) < 16 else {}), **given}
