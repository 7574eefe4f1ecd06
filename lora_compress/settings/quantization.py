"""How the numbers of the kept components are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["BITS_ALLOWED", "BITS_TABLE", "STRATEGIES", "QuantizationSettings", "allows_bits"]

STRATEGIES = ("dynamic", "static", "nf4", "mixed", "entropy")
BITS_ALLOWED = {
    "dynamic": "2, 3, 4, 5, 6, 8",
    "static": "2, 3, 4, 5, 6, 8",
    "nf4": "4",
    "mixed": "an average from 2 to 8, or none with a target",
    "entropy": "an average above 0 and up to 8, or none with a target",
}
BITS_TABLE = "; ".join(f"{name}: {bits}" for name, bits in BITS_ALLOWED.items()) + "; no quantization: 16 with dynamic or static"
_WHOLE = {"dynamic": (2, 3, 4, 5, 6, 8, 16), "static": (2, 3, 4, 5, 6, 8, 16), "nf4": (4,)}
_AVERAGE_FROM = {"mixed": 2.0, "entropy": 0.0}  # entropy: above it
_AVERAGE_TO = 8.0
_GROUP_SIZES = {
    "dynamic": (16, 32, 64, 128, 256, 512, 1024),
    "nf4": (32, 64, 128, 256),
    "mixed": (16, 32, 64, 128, 256, 512, 1024),
}
_NO_GROUPS = {"static": "one scale per component", "entropy": "one step for the whole file"}
_DEFAULT_GROUP_SIZE = 64
_DEFAULT_STATIC_SCALE = 0.0625


@dataclass(frozen=True)
class QuantizationSettings:
    """How the numbers of the kept components are stored. `None` means the strategy's own default.

    dynamic: integers, scale of least squared error per group. static: integers, step = scale x RMS of the component.
    nf4: bitsandbytes' NF4. mixed: dynamic, bits per component by the budget. entropy: one step for the file, entropy-coded.
    """

    bits: float | None = field(default=None, metadata={"help": f"bits per stored weight ({BITS_TABLE}); default 16"})
    strategy: str = field(default="dynamic", metadata={"help": ", ".join(STRATEGIES[:-1]) + f" or {STRATEGIES[-1]}"})
    group_size: int | None = field(default=None, metadata={"help": "weights that share a scale (dynamic, nf4, mixed); default 64"})
    scale: float | None = field(default=None, metadata={"help": "static only: 8-bit step / RMS of the component; default 0.0625"})
    progressive: bool = field(default=False, metadata={"help": "entropy only: any beginning of the file is a smaller LoRA"})
    refine: bool = field(default=True, metadata={"help": "entropy only: refit each factor to what became of the other"})

    def __post_init__(self) -> None:
        if self.bits is not None and float(self.bits).is_integer():
            object.__setattr__(self, "bits", int(self.bits))  # told as 4, not as 4.0

    @property
    def enabled(self) -> bool:
        """Whether weights are stored in fewer than 16 bits."""
        return self.averages or (self.bits is not None and self.bits < 16)

    @property
    def averages(self) -> bool:
        """Whether bits are an average over the file that a budget may take the place of: mixed and entropy."""
        return self.strategy in _AVERAGE_FROM

    @property
    def codec_name(self) -> str:
        """`entropy`, or the name by which `quantization.FixedFormat` knows these settings: mixed, nf4, int4 and so on."""
        return self.strategy if self.averages or self.strategy == "nf4" else f"int{self.bits}"

    @property
    def block_size(self) -> int | None:
        """Weights per scale; None means one scale for each component (static) or none at all (entropy)."""
        return None if self.strategy in _NO_GROUPS else self.group_size or _DEFAULT_GROUP_SIZE

    @property
    def static_scale(self) -> float | None:
        """The scale of strategy static, None for the others."""
        if self.strategy != "static":
            return None
        return _DEFAULT_STATIC_SCALE if self.scale is None else self.scale

    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        if self.strategy not in STRATEGIES:
            return [f"strategy={self.strategy}: must be one of {', '.join(STRATEGIES)}"]
        return [*self._bits_problems(), *self._group_problems(), *self._scale_problems(), *self._entropy_problems()]

    def budget_problems(self, budget: bool) -> list[str]:
        """What is wrong about bits beside a `budget`, a target_size or target_error; mixed and entropy take one of the two."""
        if not self.averages or (self.bits is None) == budget:
            return []
        if budget:
            return [f"bits={self.bits:g} with strategy={self.strategy} and a target: give the one or the other"]
        return [f"bits=none with strategy={self.strategy} and no target: give bits, target_size or target_error ({BITS_TABLE})"]

    def _bits_problems(self) -> list[str]:
        if self.bits is None:
            needed = self.strategy in ("static", "nf4")
            return [f"bits=none with strategy={self.strategy}: allowed are {BITS_TABLE}"] if needed else []
        if self.averages:
            least = _AVERAGE_FROM[self.strategy]
            allowed = 0.0 < self.bits <= _AVERAGE_TO and self.bits >= least
        else:
            allowed = self.bits in _WHOLE[self.strategy]
        return [] if allowed else [f"bits={self.bits:g} with strategy={self.strategy}: allowed are {BITS_TABLE}"]

    def _group_problems(self) -> list[str]:
        if self.group_size is None:
            return []
        if self.strategy in _NO_GROUPS:
            return [f"group_size is not used by strategy={self.strategy} ({_NO_GROUPS[self.strategy]}): remove it"]
        allowed = _GROUP_SIZES[self.strategy]
        if self.group_size in allowed:
            return []
        return [f"group_size={self.group_size}: strategy={self.strategy} allows {', '.join(map(str, allowed))}"]

    def _scale_problems(self) -> list[str]:
        if self.scale is None:
            return []
        if self.strategy != "static":
            return [f"scale is only used by strategy=static, not by {self.strategy}: remove it"]
        return [] if 0.0 < self.scale < math.inf else [f"scale={self.scale:g}: must be above 0 (0.0625 to 0.25 is usual)"]

    def _entropy_problems(self) -> list[str]:
        if self.strategy == "entropy":
            return []
        given = {"progressive=true": self.progressive, "refine=false": not self.refine}
        return [f"{text} is only possible with strategy=entropy, not with {self.strategy}" for text, on in given.items() if on]


def allows_bits(strategy: str, bits: float) -> bool:
    """Whether a strategy can store weights in so many bits."""
    return not QuantizationSettings(bits=bits, strategy=strategy).problems()
