"""What happens to the network while it learns: components that go step by step, quantization in the forward pass, calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..quantization.registry import STRATEGIES
from .pruning import PruningSettings
from .quantization import QuantizationSettings

__all__ = ["IMPORTANCES", "SCHEDULES", "QatSettings", "TrainingSettings"]

SCHEDULES = {"cubic": 3.0, "linear": 1.0}  # power of what is left of the way
IMPORTANCES = ("magnitude", "sensitivity", "activation")


@dataclass(frozen=True)
class TrainingSettings:
    """Pruning while training; `training.schedule` has the formulas. Shares are of the steps of the training."""

    iterative_pruning: bool = field(
        default=False, metadata={"help": "remove components step by step during the training, not at saving alone"}
    )
    max_iterations: int = field(default=10, metadata={"help": "pruning steps between pruning_start and pruning_end, 1 or more"})
    pruning_start: float = field(default=0.1, metadata={"help": "share of the steps before the first pruning step, in [0, 1)"})
    pruning_end: float = field(
        default=0.5, metadata={"help": "share of the steps after which the ranks are frozen; the rest heals, in (0, 1]"}
    )
    pruning_schedule: str = field(default="cubic", metadata={"help": f"how the budget falls: {', '.join(SCHEDULES)}"})
    importance: str = field(default="magnitude", metadata={"help": f"what components are chosen by: {', '.join(IMPORTANCES)}"})
    rank_return: bool = field(default=False, metadata={"help": "whether a masked component may come back before pruning_end"})
    collect_calibration: bool = field(
        default=False, metadata={"help": "write <name>.calibration.safetensors beside the last file, for compressing it further"}
    )

    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = []
        if self.max_iterations < 1:
            found.append(f"max_iterations={self.max_iterations}: must be 1 or more")
        if not 0.0 <= self.pruning_start < 1.0:
            found.append(f"pruning_start={self.pruning_start:g}: must lie in [0, 1)")
        if not 0.0 < self.pruning_end <= 1.0:
            found.append(f"pruning_end={self.pruning_end:g}: must lie in (0, 1]")
        elif self.pruning_end <= self.pruning_start < 1.0:
            found.append(f"pruning_end={self.pruning_end:g}: must lie after pruning_start={self.pruning_start:g}")
        if self.pruning_schedule not in SCHEDULES:
            found.append(f"pruning_schedule={self.pruning_schedule}: must be one of {', '.join(SCHEDULES)}")
        if self.importance not in IMPORTANCES:
            found.append(f"importance={self.importance}: must be one of {', '.join(IMPORTANCES)}")
        return found

    def joint_problems(self, pruning: PruningSettings) -> list[str]:
        """What is wrong beside the settings of `pruning`."""
        given = {"rank_return=true": self.rank_return, f"importance={self.importance}": self.importance != "magnitude"}
        if not self.iterative_pruning:
            return [f"{text} is only used by iterative_pruning=true: set it, or remove this" for text, on in given.items() if on]
        if pruning.norm_threshold and self.importance != "magnitude":
            why = "it is a singular value: use rank_ratio, new_rank or layer_threshold"
            return [f"norm_threshold={pruning.norm_threshold:g} with importance={self.importance}: {why}"]
        if pruning.enabled and pruning != PruningSettings(channel_threshold=pruning.channel_threshold):
            return []
        return ["iterative_pruning=true has nothing to remove: set rank_ratio below 1, new_rank, a threshold or dynamic_method"]


@dataclass(frozen=True)
class QatSettings:
    """Quantization-aware training: the forward pass computes with the weights that the file will hold."""

    qat: bool = field(default=False, metadata={"help": "train with the weights as the file will hold them (needs bits under 16)"})
    qat_start: float = field(default=0.5, metadata={"help": "share of the steps after which the weights are quantized, in [0, 1)"})
    qat_refresh: int = field(default=20, metadata={"help": "steps between searches for the best scales, 1 or more"})

    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = []
        if not 0.0 <= self.qat_start < 1.0:
            found.append(f"qat_start={self.qat_start:g}: must lie in [0, 1)")
        if self.qat_refresh < 1:
            found.append(f"qat_refresh={self.qat_refresh}: must be 1 or more")
        return found

    def joint_problems(self, quantization: QuantizationSettings, pruning: PruningSettings, budget: bool, pruned: bool) -> list[str]:
        """What is wrong beside the other settings.

        Args:
            quantization: the codec.
            pruning: what is removed.
            budget: whether a size or an error is asked for.
            pruned: whether components go while training, so that nothing but channels is removed at saving.
        """
        if not self.qat:
            return []
        found = []
        if not quantization.enabled:
            found.append("qat=true trains with quantized weights: set bits under 16")
        elif quantization.strategy in STRATEGIES and (reason := quantization.method.untrainable):
            others = [name for name, strategy in STRATEGIES.items() if not strategy.untrainable]
            listed = f"{', '.join(others[:-1])} or {others[-1]}"
            found.append(f"qat=true with strategy={quantization.strategy}: {reason}: use {listed}")
        if quantization.progressive:
            found.append("qat=true and progressive=true contradict each other: a part of the file would not be what was trained")
        if budget:
            found.append(
                "qat=true and a target contradict each other: what was trained is saved as it is: give bits and rank_ratio"
            )
        if not math.isclose(pruning.channel_threshold, 0.0):
            found.append("qat=true and channel_threshold contradict each other: no channel is removed from what was trained")
        if not pruned and pruning != PruningSettings(channel_threshold=pruning.channel_threshold, min_rank=pruning.min_rank):
            found.append("qat=true removes no component at saving: set iterative_pruning=true to remove them while training")
        return found
