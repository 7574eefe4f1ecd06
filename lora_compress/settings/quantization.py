"""How the numbers of the kept components are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["BITS_TABLE", "QuantizationSettings"]

STRATEGIES = ("dynamic", "static", "nf4")
BITS_TABLE = "dynamic: 4, 8; static: 4, 8; nf4: 4; no quantization: 16"
_BITS = {"dynamic": (4, 8), "static": (4, 8), "nf4": (4,)}
_GROUP_SIZES = {"dynamic": (16, 32, 64, 128, 256, 512, 1024), "nf4": (32, 64, 128, 256)}
_DEFAULT_GROUP_SIZE = 64
_DEFAULT_STATIC_SCALE = 0.0625


@dataclass(frozen=True)
class QuantizationSettings:
    """How the numbers of the kept components are stored. `None` for group_size and scale means the strategy's own default."""

    bits: int = field(default=16, metadata={"help": f"bits per stored weight ({BITS_TABLE})"})
    strategy: str = field(default="dynamic", metadata={"help": "dynamic, static or nf4"})
    group_size: int | None = field(default=None, metadata={"help": "weights that share a scale (dynamic, nf4); default 64"})
    scale: float | None = field(default=None, metadata={"help": "static only: 8-bit step / RMS of the component; default 0.0625"})

    @property
    def enabled(self) -> bool:
        """Whether weights are stored in fewer than 16 bits."""
        return self.bits < 16

    @property
    def codec_name(self) -> str:
        """Name of the codec in `quantization.CODECS` that writes these settings."""
        return "nf4" if self.strategy == "nf4" else f"int{self.bits}"

    @property
    def block_size(self) -> int | None:
        """Weights per scale; None (strategy static) means one scale for each component."""
        return None if self.strategy == "static" else self.group_size or _DEFAULT_GROUP_SIZE

    @property
    def static_scale(self) -> float | None:
        """The scale of strategy static, None for the others."""
        if self.strategy != "static":
            return None
        return _DEFAULT_STATIC_SCALE if self.scale is None else self.scale

    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = []
        if self.strategy not in STRATEGIES:
            return [f"strategy={self.strategy}: must be one of {', '.join(STRATEGIES)}"]
        if self.bits not in _BITS[self.strategy] and not (self.bits == 16 and self.strategy != "nf4"):
            found.append(f"bits={self.bits} with strategy={self.strategy}: allowed are {BITS_TABLE}")
        allowed_groups = _GROUP_SIZES.get(self.strategy, ())
        if self.group_size is not None and not allowed_groups:
            found.append("group_size is not used by strategy=static (one scale per component): remove it")
        elif self.group_size is not None and self.group_size not in allowed_groups:
            found.append(f"group_size={self.group_size}: strategy={self.strategy} allows {', '.join(map(str, allowed_groups))}")
        if self.scale is not None and self.strategy != "static":
            found.append(f"scale is only used by strategy=static, not by {self.strategy}: remove it")
        elif self.scale is not None and not 0.0 < self.scale < math.inf:
            found.append(f"scale={self.scale:g}: must be above 0 (0.0625 to 0.25 is usual)")
        return found
