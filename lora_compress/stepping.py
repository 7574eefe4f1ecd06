"""The quantization step of an entropy-coded file: one for all modules, fitted to a size or to an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from .allocation import fit_step
from .encoding import Choice
from .frame import Frame, Plan, error_targets, payload_size
from .job import Job, Stored
from .update import relative_error

__all__ = ["fit_steps"]

_TOLERANCE = 0.005  # share of a budget that may be left
_MODULE_BYTES = 40  # of an entry in the index, and of what a payload says of itself


def fit_steps(job: Job, kept: Mapping[str, Tensor], frame: Frame, payload: int | None) -> Plan:
    """Steps that meet the budget of the job's settings, or `payload` bytes.

    The step of module m is step / sqrt(w_m). A part of the model whose own error asks for a finer step than the file gets it.
    The search starts from the rate and the error that Gaussian weights would have.

    Args:
        job: whose modules are coded.
        kept: singular values of the components that pruning left.
        frame: sizes, parts and weights.
        payload: bytes of all chunks together; None for the settings' size or errors.

    Raises:
        SettingsError: the budget cannot be met.
    """
    whole = _Part(job, list(kept), kept, frame)
    if payload is not None:
        return whole.fit(payload, lambda stored: float(payload_size(stored)), rising=False)
    if job.settings.budget.size is not None:
        return whole.fit(job.settings.budget.size, lambda stored: float(frame.file_size(stored)), rising=False)
    targets = error_targets(job.settings.budget, frame.parts)
    found = Plan({}, {})
    if "" in targets:
        found = whole.fit(targets.pop(""), whole.error, rising=True)
    for name, target in targets.items():
        part = _Part(job, [module for module in kept if frame.parts[module] == name], kept, frame)
        if not found.choices.keys() >= set(part.names) or part.error(found.stored or {}) > target:
            finer = part.fit(target, part.error, rising=True)
            stored = {k: v for k, v in (found.stored or {}).items() if k not in finer.choices} | (finer.stored or {})
            found = Plan(found.choices | finer.choices, stored)
    order = {name: i for i, name in enumerate(kept)}
    stored = dict(sorted((found.stored or {}).items(), key=lambda item: order[item[0]]))
    return Plan({name: found.choices.get(name, Choice(0)) for name in kept}, stored)


class _Part:
    """Some modules of a file, coded with one step; and what that would take if their weights were Gaussian."""

    def __init__(self, job: Job, names: list[str], kept: Mapping[str, Tensor], frame: Frame) -> None:
        self.job, self.names = job, names
        self._ranks = {name: len(kept[name]) for name in names}
        self._finer = {name: frame.weights.get(name, 1.0) ** 0.5 for name in names}
        self._norm = sum(job.analyses[name].norm for name in names)
        shapes = [job.analyses[name].shape.stored for name in names for _ in range(self._ranks[name])]
        self._widths = np.array(shapes, dtype=np.float64).reshape(-1, 2)  # weights of a component's two rows
        scaled = [kept[name].double().numpy() * self._finer[name] for name in names]
        self._sigma = np.concatenate(scaled) if scaled else np.zeros(0)

    def fit(self, budget: float, measure: Callable[[Mapping[str, Stored]], float], rising: bool) -> Plan:
        """The step at which what `measure` says comes closest to the budget from below."""
        best: tuple[float, float, dict[str, Stored]] | None = None  # value, step and modules; a run is a whole file, one is kept

        def evaluate(step: float) -> float:
            nonlocal best
            stored = dict(self.job.run(self._choices(step)))
            value = measure(stored)
            if value <= budget and (best is None or value > best[0]):
                best = value, step, stored
            return value

        estimate = self._gaussian_error if rising else self._gaussian_bytes
        start = self._invert(estimate, budget, rising)
        fit = fit_step(evaluate, budget, start=start, rising=rising, estimate=estimate, tolerance=_TOLERANCE)
        if best is not None and best[1] == fit.step:
            return Plan(self._choices(fit.step), best[2])
        return Plan(self._choices(fit.step), dict(self.job.run(self._choices(fit.step))))

    def error(self, stored: Mapping[str, Stored]) -> float:
        """||dW - dW'|| / ||dW|| over these modules."""
        lost = sum(stored[n].squared_error if n in stored else self.job.analyses[n].norm for n in self.names)
        return relative_error(lost, self._norm)

    def _choices(self, step: float) -> dict[str, Choice]:
        return {n: Choice(self._ranks[n], step=step / self._finer[n]) for n in self.names if self._ranks[n]}

    def _gaussian_bytes(self, step: float) -> float:
        """Rate of uniformly quantized Gaussian rows of RMS sigma / sqrt(n): log2(RMS sqrt(2 pi e) / step), near zero below."""
        rms = self._sigma[:, None] / np.sqrt(self._widths)
        bits = 0.5 * np.log2(1.0 + 2 * math.pi * math.e * np.square(rms / step))
        return float((bits * self._widths).sum() / 8) + _MODULE_BYTES * len(self.names)

    def _gaussian_error(self, step: float) -> float:
        """step^2 / 12 for each weight of both rows, and never more than the component itself; the weights of modules left out."""
        squares = np.square(self._sigma)
        lost = np.minimum(self._widths.sum(axis=1) * step**2 / 12, squares).sum()
        return float(np.sqrt(lost / max(squares.sum(), np.finfo(np.float64).tiny)))

    def _invert(self, estimate: Callable[[float], float], target: float, rising: bool) -> float:
        """The step at which an estimate meets the target: bisection in octaves."""
        low, high = -60.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            finer = estimate(2.0**middle) > target if rising else estimate(2.0**middle) <= target
            low, high = (low, middle) if finer else (middle, high)
        return 2.0 ** ((low + high) / 2)
