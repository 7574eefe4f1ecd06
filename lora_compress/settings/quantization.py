"""How the numbers of the kept components are stored."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ..quantization.fake import FakeQuantizer
from ..quantization.fixed_width import DEFAULT_GROUP_SIZE
from ..quantization.registry import STRATEGIES
from ..quantization.strategy import Strategy

__all__ = ["QuantizationSettings", "allows_bits", "bits_table"]


def bits_table() -> str:
    """Return the bits that each strategy allows, in words."""
    allowed = "; ".join(f"{name}: {strategy.allowed_bits}" for name, strategy in STRATEGIES.items())
    off = " or ".join(name for name, strategy in STRATEGIES.items() if strategy.off_at_16)
    return f"{allowed}; no quantization: 16 with {off}"


def _listed(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@dataclass(frozen=True)
class QuantizationSettings:
    """How the numbers of the kept components are stored. `None` means the strategy's own default.

    dynamic: integers, scale of least squared error per group. static: integers, step = scale x RMS of the component.
    nf4: bitsandbytes' NF4. mixed: dynamic, bits per component by the budget. entropy: one step for the file, entropy-coded.
    """

    bits: float | None = field(default=None, metadata={"help": f"bits per stored weight ({bits_table()}); default 16"})
    strategy: str = field(default="dynamic", metadata={"help": _listed(list(STRATEGIES))})
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
    def method(self) -> Strategy:
        """The strategy of this name from the registry."""
        return STRATEGIES[self.strategy]

    @property
    def averages(self) -> bool:
        """Whether bits are an average over the file that a budget may take the place of."""
        return self.strategy in STRATEGIES and self.method.averages

    @property
    def codec_name(self) -> str:
        """The name that packed files of these settings give their codec where quantization is enabled: int4, mixed and so on."""
        return self.method.codec_name(self)

    @property
    def block_size(self) -> int | None:
        """Weights per scale; None if the strategy has no groups."""
        return (self.group_size or DEFAULT_GROUP_SIZE) if self.method.group_sizes else None

    @property
    def static_scale(self) -> float | None:
        """The setting `scale` with its default filled in, None for strategies that do not read it."""
        return self.method.defaults.get("scale") if self.scale is None else self.scale

    def fake_quantizer(self) -> FakeQuantizer:
        """Return a new quantizer for the forward passes of a training."""
        return self.method.fake_quantizer(self)

    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        if self.strategy not in STRATEGIES:
            return [f"strategy={self.strategy}: must be one of {', '.join(STRATEGIES)}"]
        strange = self._strange_problems()
        return [*self._bits_problems(), *self._group_problems(), *(strange or self.method.problems(self))]

    def budget_problems(self, budget: bool) -> list[str]:
        """What is wrong about bits beside a `budget`, a target_size or target_error; mixed and entropy take one of the two."""
        if not self.averages or (self.bits is None) == budget:
            return []
        if budget:
            return [f"bits={self.bits:g} with strategy={self.strategy} and a target: give the one or the other"]
        return [f"bits=none with strategy={self.strategy} and no target: give bits, target_size or target_error ({bits_table()})"]

    def _bits_problems(self) -> list[str]:
        if self.bits is None:
            return [f"bits=none with strategy={self.strategy}: allowed are {bits_table()}"] if self.method.needs_bits else []
        allowed = self.method.allows(self.bits)
        return [] if allowed else [f"bits={self.bits:g} with strategy={self.strategy}: allowed are {bits_table()}"]

    def _group_problems(self) -> list[str]:
        if self.group_size is None:
            return []
        if not self.method.group_sizes:
            return [f"group_size is not used by strategy={self.strategy} ({self.method.ungrouped}): remove it"]
        if self.group_size in self.method.group_sizes:
            return []
        return [f"group_size={self.group_size}: strategy={self.strategy} allows {', '.join(map(str, self.method.group_sizes))}"]

    def _strange_problems(self) -> list[str]:
        """Settings that are given but belong to other strategies."""
        found = []
        for option in fields(self):
            value, owners = getattr(self, option.name), _owners(option.name)
            if not owners or value == option.default or self.strategy in owners:
                continue
            if isinstance(value, bool):
                given = f"{option.name}={str(value).lower()}"
                found.append(f"{given} is only possible with strategy={_listed(owners)}, not with {self.strategy}")
            else:
                found.append(f"{option.name} is only used by strategy={_listed(owners)}, not by {self.strategy}: remove it")
        return found


def _owners(option: str) -> list[str]:
    """Names of the strategies that read one of the settings that not all of them read."""
    return [name for name, strategy in STRATEGIES.items() if option in strategy.defaults]


def allows_bits(strategy: str, bits: float) -> bool:
    """Whether a strategy can store weights in so many bits."""
    return not QuantizationSettings(bits=bits, strategy=strategy).problems()
