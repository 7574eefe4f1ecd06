"""The quantization step for a budget, where one look at a step costs seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import SettingsError

__all__ = ["StepFit", "fit_step"]

_FARTHEST = math.log(64.0)  # a jump beyond what is known, unless an estimate says where to: at most a factor of 64
_NARROWEST = 1e-9  # a bracket of log steps that is as good as a point


@dataclass(frozen=True)
class StepFit:
    """A step that keeps to its budget.

    Args:
        step: the quantization step.
        value: evaluate(step), at most the budget.
        evaluations: how often `evaluate` was called.
    """

    step: float
    value: float
    evaluations: int


def fit_step(
    evaluate: Callable[[float], float],
    budget: float,
    *,
    start: float,
    rising: bool,
    estimate: Callable[[float], float] | None = None,
    tolerance: float = 0.01,
    bounds: tuple[float, float] = (1e-12, 1e12),
    max_evaluations: int = 20,
) -> StepFit:
    """The step whose value comes closest to the budget from below, within `tolerance` of it where the values leave no gap.

    With rising=True (an error) that is the largest step with evaluate(step) <= budget, with rising=False (bytes) the smallest.
    log evaluate is taken as nearly linear in log step: secants, kept inside the bracket of the best step that fits and the
    nearest that does not, halving it when a secant gains too little. With an `estimate` the next step is where the
    estimate, corrected by the factor by which it was last wrong, meets the target. What is returned was evaluated and fits.

    Args:
        evaluate: bytes or error at a step; monotone but for small wiggles.
        budget: not to be exceeded, above 0.
        start: the first step to look at; without knowledge of the data, any.
        rising: whether values rise with the step.
        estimate: a cheap approximation of `evaluate`, monotone likewise.
        tolerance: share of the budget that may stay unused.
        bounds: smallest and largest step to consider.
        max_evaluations: calls of `evaluate` at most, as long as one of them fits.

    Raises:
        SettingsError: not even the coarsest (bytes) or finest (error) step of `bounds` keeps to the budget.
    """
    sign = 1.0 if rising else -1.0
    low, high = sorted(sign * math.log(bound) for bound in bounds)  # the value rises with x = sign * log step
    target = budget * (1.0 - tolerance / 2)
    search = _Search(low, high, target, estimate and (lambda x: estimate(math.exp(sign * x))))
    x = min(max(sign * math.log(start), low), high)
    while True:
        value = evaluate(math.exp(sign * x))
        search.learn(x, value, value <= budget)
        best = search.best
        if best is not None:
            close = best[1] >= budget * (1.0 - tolerance)
            if close or best[0] == high or search.width <= _NARROWEST or search.count >= max_evaluations:
                return StepFit(math.exp(sign * best[0]), best[1], search.count)
        elif x == low:
            raise SettingsError([f"the target of {budget:g} cannot be met: the least that can be reached is {value:g}"])
        x = search.propose()


class _Search:
    """What is known of a rising function, and where to look next."""

    def __init__(self, low: float, high: float, target: float, estimate: Callable[[float], float] | None) -> None:
        self._low, self._high = low, high
        self._target, self._estimate = target, estimate
        self._points: list[tuple[float, float]] = []
        self._misses: tuple[float, float] | None = None  # the nearest point above the budget
        self._width = math.inf
        self._slow = 0
        self.best: tuple[float, float] | None = None

    @property
    def count(self) -> int:
        return len(self._points)

    @property
    def width(self) -> float:
        """Of the bracket; infinite while one side is open."""
        return math.inf if self.best is None or self._misses is None else self._misses[0] - self.best[0]

    def learn(self, x: float, value: float, fits: bool) -> None:
        self._points.append((x, value))
        if fits and (self.best is None or x > self.best[0]):
            self.best = (x, value)
        elif not fits and (self._misses is None or x < self._misses[0]):
            self._misses = (x, value)
        if self.best is not None and self._misses is not None and self._misses[0] <= self.best[0]:
            self._misses = min((p for p in self._points if p[0] > self.best[0]), default=None)  # a wiggle
        self._slow = self._slow + 1 if self.width > 0.5 * self._width else 0
        self._width = self.width

    def propose(self) -> float:
        """The next x: inside the bracket where it is closed, not too far beyond what is known where it is open."""
        least = self._low if self.best is None else self.best[0]
        most = self._high if self._misses is None else self._misses[0]
        if self.best is not None and self._misses is not None and self._slow >= 2:
            self._slow = 0
            return (least + most) / 2
        x = self._guess()
        if self.best is not None and self._misses is not None:
            margin = 0.02 * (most - least)
            return min(max(x, least + margin), most - margin)
        known, direction = (most, -1.0) if self.best is None else (least, 1.0)
        least_jump = 0.01 if self._estimate is None else 0.001
        shortest = min(least_jump * 2.0**self.count, _FARTHEST)  # so that a flat stretch is left behind
        jump = min(max(direction * (x - known), shortest), _FARTHEST if self._estimate is None else math.inf)
        return min(max(known + direction * jump, self._low), self._high)

    def _guess(self) -> float:
        last, value = self._points[-1]
        if self._estimate is not None:
            return self._meet(last, value)
        slope = self._slope()
        if not 0.0 < value < math.inf:
            return last + (-_FARTHEST if value else _FARTHEST)
        return last + math.log(self._target / value) / slope

    def _slope(self) -> float:
        """Of log value over x: across the bracket, else through the last two points, else 1."""
        pair = [self.best, self._misses] if self.best and self._misses else self._points[-2:]
        known = [(x, math.log(value)) for x, value in filter(None, pair) if 0.0 < value < math.inf]
        if len(known) < 2 or known[0][0] == known[1][0]:
            return 1.0
        slope = (known[1][1] - known[0][1]) / (known[1][0] - known[0][0])
        return min(max(slope, 0.05), 20.0)

    def _meet(self, last: float, value: float) -> float:
        """Where the estimate, scaled to be right at `last`, meets the target: bisection, as it costs nothing."""
        assert self._estimate is not None
        guessed = self._estimate(last)
        factor = value / guessed if 0.0 < guessed < math.inf and 0.0 < value < math.inf else 1.0
        low, high = self._low, self._high
        for _ in range(48):
            middle = (low + high) / 2
            low, high = (middle, high) if self._estimate(middle) * factor <= self._target else (low, middle)
        return low
