"""When things happen in a training: pure functions of the number of finished optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..settings import QatSettings, TrainingSettings
from ..settings.training import SCHEDULES

__all__ = ["Schedule", "Timeline", "polynomial_schedule", "pruning_steps"]

Schedule = Callable[[int], float]

_FROZEN = 0.05  # share of the steps at the end in which scales stay as they are, so that weights settle on them
_SAMPLED = 0.1  # share of the steps at the end in which inputs are sampled for a calibration


def polynomial_schedule(begin: int, end: int, power: float = 3.0) -> Schedule:
    """Share of the budget that is still above the goal: 1 before `begin`, 0 from `end` on.

    w(t) = (1 - (t - begin) / (end - begin))^power between them. Power 3 is the cubic schedule of Zhu and Gupta
    (https://arxiv.org/abs/1710.01878) and AdaLoRA: most goes early, while there is time to heal. With `end` <= `begin` it is
    the step from 1 to 0 at `end`.
    """

    def weight(step: int) -> float:
        if step >= end:
            return 0.0
        return 1.0 if step <= begin else (1.0 - (step - begin) / (end - begin)) ** power

    return weight


def pruning_steps(begin: int, end: int, count: int) -> tuple[int, ...]:
    """Up to `count` steps, evenly spaced, the last at `end`, all after `begin`; fewer where there are not that many between."""
    return tuple(sorted({begin + -(-(end - begin) * k // count) for k in range(1, count + 1)})) if end > begin else (end,)


@dataclass(frozen=True)
class Timeline:
    """The events of one training, each at a number of finished optimizer steps.

    Args:
        total: steps of the training.
        rotation: when the factors are brought to their balanced form for the first time, None without pruning.
        pruning: when components go.
        above_goal: see `polynomial_schedule`.
        quantization: when the forward pass begins to quantize, None for never.
        refresh: steps between two searches for scales.
        frozen: from when on scales stay.
        sampling: from when on inputs are sampled for a calibration, None for never.
    """

    total: int
    rotation: int | None = None
    pruning: tuple[int, ...] = ()
    above_goal: Schedule = lambda step: 0.0
    quantization: int | None = None
    refresh: int = 1
    frozen: int = 0
    sampling: int | None = None

    @classmethod
    def of_settings(cls, training: TrainingSettings, qat: QatSettings, total: int) -> Timeline:
        """begin = round(start total), end = round(end total); nothing before the first step has been made."""
        rotation: int | None = None
        pruning: tuple[int, ...] = ()
        above_goal = polynomial_schedule(0, 0)
        if training.iterative_pruning:
            end = max(round(training.pruning_end * total), 1)
            rotation = min(max(round(training.pruning_start * total), 1), end)
            pruning = pruning_steps(rotation, end, training.max_iterations)
            above_goal = polynomial_schedule(rotation, end, SCHEDULES[training.pruning_schedule])
        quantization = max(round(qat.qat_start * total), 1) if qat.qat else None
        sampling = total - max(round(_SAMPLED * total), 1) if training.collect_calibration else None
        frozen = total - max(round(_FROZEN * total), 1)
        return cls(total, rotation, pruning, above_goal, quantization, qat.qat_refresh, frozen, sampling)

    def samples(self, step: int) -> bool:
        """Whether inputs are sampled in the forward passes after this step."""
        return self.sampling is not None and step >= self.sampling

    def refreshes(self, step: int) -> bool:
        """Whether scales are searched after this step: 1, 2, 4, 8, ... steps after the first time, and every `refresh` steps.

        Weights that were zero when quantization began grow fastest at first, hence the doubling.
        """
        if self.quantization is None or not self.quantization < step < self.frozen:
            return False
        since = step - self.quantization
        return since & (since - 1) == 0 or since % self.refresh == 0
