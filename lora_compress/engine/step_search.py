"""The search for the step size of an entropy-coded file: one for all modules, fitted to a size or to an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from ..allocation import fit_step
from ..errors import SettingsError
from ..quantization import ModulePlan
from ..quantization.entropy.stages import LEAST_PLANES, MOST_PLANES
from ..update import relative_error
from .context import FileContext, Plan, error_targets, payload_size, require_room
from .encode import EncodedModule, Encoder

__all__ = ["expected_bytes", "fit_steps"]

_TOLERANCE = 0.008  # share of a budget that may be left
_NEAR = 0.015  # share of a budget by which a prediction may miss it for the estimate to be exact after the correction
_PREDICTIONS = 3
_BESIDE = 1.0 + 1e-9  # from one step to the next to look at
_FARTHEST = 1e4  # squared, of a step that a calibration asks for, from that of all modules
_PHASES = (0, 4, 2, 6)  # of neighbours in a progressive file: half of the modules are between two layers where the others end one
_ABOVE = 1.5  # octaves from the cells of a file's highest plane to the values of its strongest row: its first cut leaves some 40 %
_CODABLE = (1e-9, 1e9)  # norms of the strongest component between which the tables of the coder have a scale for every row
_MODULE_BYTES = 40  # of an entry in the index, and of what a payload says of itself


def fit_steps(encoder: Encoder, kept: Mapping[str, Tensor], context: FileContext, payload: int | None) -> Plan:
    """Find step sizes that meet the budget of the settings, or `payload` bytes.

    The step of module m is step / sqrt(w_m), w_m its weight times what its scores are worth beyond its singular values. A part of
    the model whose own error asks for a finer step than the file gets it.
    The search starts from the rate and the error that Gaussian weights would have.

    Args:
        job: whose modules are coded.
        kept: scores of the components that pruning left: their singular values, or what they are worth.
        frame: sizes, parts and weights.
        payload: bytes of all chunks together; None for the settings' size or errors.

    Raises:
        SettingsError: the budget cannot be met, or the updates are too small or too large for the coder.
    """
    _require_codable(encoder)
    whole = _Part(encoder, list(kept), kept, context)
    if payload is not None:
        return whole.fit(payload, lambda stored: float(payload_size(stored)), rising=False)
    if encoder.settings.budget.size is not None:
        require_room(encoder.settings.budget.size, context.file_size({}))
        return whole.fit(encoder.settings.budget.size, lambda stored: float(context.file_size(stored)), rising=False)
    targets = error_targets(encoder.settings.budget, context.parts)
    found = Plan({}, {})
    if "" in targets:
        found = whole.fit(targets.pop(""), whole.error, rising=True)
    for name, target in targets.items():
        part = _Part(encoder, [module for module in kept if context.parts[module] == name], kept, context)
        if not found.choices.keys() >= set(part.names) or part.error(found.stored or {}) > target:
            finer = part.fit(target, part.error, rising=True)
            stored = {k: v for k, v in (found.stored or {}).items() if k not in finer.choices} | (finer.stored or {})
            found = Plan(found.choices | finer.choices, stored)
    order = {name: i for i, name in enumerate(kept)}
    stored = dict(sorted((found.stored or {}).items(), key=lambda item: order[item[0]]))
    return Plan({name: found.choices.get(name, ModulePlan(0)) for name in kept}, stored)


def expected_bytes(encoder: Encoder, kept: Mapping[str, Tensor], context: FileContext) -> float:
    """Return the bytes of payload and index that the errors of the settings would take if all weights were Gaussian.

    Nothing is coded for this. Arguments as `fit_steps`.
    """
    _require_codable(encoder)
    sizes = {}
    for name, target in error_targets(encoder.settings.budget, context.parts).items():
        part = _Part(encoder, [module for module in kept if not name or context.parts[module] == name], kept, context)
        sizes[name] = part.expected_bytes(target)
    return max(sizes.pop("", 0.0), sum(sizes.values()))


def _require_codable(encoder: Encoder) -> None:
    """Raises: SettingsError: the strongest component of all is so weak or so strong that the coder has no scale for its rows."""
    strongest = {
        name: float(analysis.spectrum.sigma[0]) for name, analysis in encoder.components.items() if len(analysis.spectrum.sigma)
    }
    name = max(strongest, key=strongest.__getitem__, default="")
    least, most = _CODABLE
    if name and strongest[name] and not least <= strongest[name] <= most:
        found = f"the strongest update, {name}, has the norm {strongest[name]:.3g}, allowed: {least:g} to {most:g}"
        raise SettingsError([f"strategy=entropy: {found}: no training gives such weights; use another strategy, which takes any"])


def _leaves_something(encoder: Encoder, name: str) -> float:
    """Return a step size at which neither row of the first component is all zeros: one of n weights is at least 1 / sqrt(n)."""
    analysis = encoder.components[name]
    return float(analysis.spectrum.sigma[0]) / math.sqrt(max(analysis.shape.stored))


def _squares(sigmas: Sequence[Tensor]) -> np.ndarray:
    return np.square(np.concatenate([np.zeros(0), *(sigma.double().numpy() for sigma in sigmas)]))


def _ratios(scores: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return by how much the scores exceed the squared singular values, relative to all; 1 everywhere where they are the same."""
    tiny = np.finfo(np.float64).tiny
    alike = max(float(squares.sum()), tiny) / max(float(scores.sum()), tiny)
    return np.where(squares > 0, np.clip(scores / np.maximum(squares, tiny) * alike, 1 / _FARTHEST, _FARTHEST), 1.0)


class _Part:
    """Some modules of a file that share one step size, and the rate and the error that Gaussian weights would have there."""

    def __init__(self, encoder: Encoder, names: list[str], kept: Mapping[str, Tensor], context: FileContext) -> None:
        self.encoder, self.names = encoder, names
        self._ranks = {name: len(kept[name]) for name in names}
        self._norm = sum(encoder.components[name].norm for name in names)
        shapes = [encoder.components[name].shape.stored for name in names for _ in range(self._ranks[name])]
        self._widths = np.array(shapes, dtype=np.float64).reshape(-1, 2)  # weights of a component's two rows
        counts = np.array([self._ranks[name] for name in names], dtype=np.int64)
        self._owner = np.repeat(np.arange(len(names)), counts)  # module of each component, and its place there
        self._place = np.arange(len(self._owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._squares = _squares([encoder.components[name].spectrum.sigma[: len(kept[name])] for name in names])
        scores = _squares([kept[name] for name in names])
        given = np.array([context.weights.get(name, 1.0) for name in names])
        modules = given * _ratios(*(np.bincount(self._owner, each, len(names)) for each in (scores, self._squares)))
        self._finer = dict(zip(names, np.sqrt(modules).tolist(), strict=True))
        self._weights = modules[self._owner]
        strengths = self._squares * self._weights / np.sqrt(self._widths.prod(axis=1))
        self._strongest = math.sqrt(float(strengths.max(initial=0.0)))
        self._worths = given[self._owner] * _ratios(scores, self._squares)
        self._gone = max(self._norm - float(self._squares.sum()), 0.0)
        least = encoder.settings.pruning.min_rank or 0
        self._least = {name: min(max(least, int(name in context.protected)), self._ranks[name]) for name in names}
        self._coded = np.ones(len(self._squares), dtype=bool)
        self._largest = {name: step for name in names if name in context.protected and (step := _leaves_something(encoder, name))}

    def fit(self, budget: float, measure: Callable[[Mapping[str, EncodedModule]], float], rising: bool) -> Plan:
        """Return the plan whose measure is closest to the budget from below, without components that are not worth their bits."""
        if rising and (least := relative_error(self._gone, self._norm)) >= budget:
            raise SettingsError([f"the error of {budget:g} that is asked for cannot be reached: pruning alone costs {least:.4g}"])
        self._trim(budget, rising)
        best: tuple[float, float, dict[str, EncodedModule]] | None = (
            None  # value, step and modules; a run is a whole file, one is kept
        )

        def evaluate(step: float) -> float:
            nonlocal best
            try:
                stored = self._run(step)
            except SettingsError:  # finer than any value can be told
                if rising:
                    raise SettingsError(
                        [f"the error of {budget:g} that is asked for cannot be reached: take a larger one"]
                    ) from None
                return math.inf
            value = measure(stored)
            if value <= budget and (best is None or value > best[0]):
                best = value, step, stored
            return value

        def estimate(step: float) -> float:
            return self._estimate(step, self._coded, rising)

        start = self._start(estimate, budget * (1 - _TOLERANCE / 2), measure, rising)
        fit = fit_step(evaluate, budget, start=start, rising=rising, estimate=estimate, tolerance=_TOLERANCE)
        if best is not None and best[1] == fit.step:
            return Plan(self._choices(fit.step), best[2])
        return Plan(self._choices(fit.step), self._run(fit.step))

    def expected_bytes(self, error: float) -> float:
        """Return the bytes that Gaussian weights would take at a relative error; 0 where pruning alone costs more."""
        if relative_error(self._gone, self._norm) >= error:
            return 0.0
        step = self._invert(lambda step: self._estimate(step, self._worth(step), True), error, True)
        return self._estimate(step, self._worth(step), False)

    def _run(self, step: float) -> dict[str, EncodedModule]:
        """Encode the modules at a step size. Those of a plain file come without factors, which are made again for writing."""
        if self.encoder.packed:
            return dict(self.encoder.run(self._choices(step)))
        return self.encoder.padded({name: stored.without_factors() for name, stored in self.encoder.run(self._choices(step))})

    def _start(
        self,
        estimate: Callable[[float], float],
        target: float,
        measure: Callable[[Mapping[str, EncodedModule]], float],
        rising: bool,
    ) -> float:
        """Return a step size that should meet the target: predictions correct the estimate by a factor until it hardly moves."""
        step, factor = self._invert(estimate, target, rising), 1.0
        for _ in range(_PREDICTIONS):
            try:
                predicted = self.encoder.predict(self._choices(step))
            except SettingsError:  # finer than any value can be told
                break
            value, guess = measure(predicted if self.encoder.packed else self.encoder.padded(predicted)), estimate(step)
            if not (0 < value < math.inf and 0 < guess < math.inf):
                break
            factor = value / guess
            step = self._invert(estimate, target / factor, rising)
            if abs(value / target - 1) < _NEAR:
                break
        return step

    def error(self, stored: Mapping[str, EncodedModule]) -> float:
        """Return ||dW - dW'||_F / ||dW||_F over these modules."""
        lost = sum(stored[n].squared_error if n in stored else self.encoder.components[n].norm for n in self.names)
        return relative_error(lost, self._norm)

    def _planes(self, step: float) -> int:
        """Return the number of bit planes for all modules, by the root mean square of the strongest row in step sizes."""
        spread = self._strongest / step
        planes = math.ceil(math.log2(spread) - _ABOVE) if 0.0 < spread < math.inf else 0
        return min(max(planes, LEAST_PLANES), MOST_PLANES)

    def _choices(self, step: float) -> dict[str, ModulePlan]:
        choices, planes = {}, self._planes(step)
        for number, name in enumerate(self.names):
            phase = _PHASES[number % len(_PHASES)] if self.encoder.settings.quantization.progressive else 0
            own = min(step * 2 ** (phase / 8) / self._finer[name], self._largest.get(name, math.inf))
            if self._ranks[name]:
                choices[name] = ModulePlan(self._ranks[name], step_size=own, phase=phase, planes=planes)
        return choices

    def _trim(self, budget: float, rising: bool) -> None:
        """Leave out components that would cost more than they are worth at the step size that the budget leads to."""
        if not len(self._squares):
            return
        step = self._invert(lambda step: self._estimate(step, self._worth(step), rising), budget, rising)
        coded, finer = self._worth(step * _BESIDE), self._worth(step / _BESIDE)
        more = np.flatnonzero(finer & ~coded)  # where all are alike the step alone does not divide them
        more = more[np.argsort(-self._squares[more] * self._weights[more] / self._widths[more].sum(axis=1), kind="stable")]
        bits, kept = self._gaussian(step)
        if rising:
            lost = self._lost(step, coded) - np.concatenate([[0.0], np.cumsum(kept[more])])
            count = int((lost > budget**2 * self._norm).sum())
        else:
            size = self._estimate(step, coded, rising) + np.cumsum(bits[more]) / 8
            count = int((size <= budget).sum())
        coded[more[:count]] = True
        if not coded.any():
            coded[np.argmax(kept)] = True
        counts = np.bincount(self._owner[coded], minlength=len(self.names)).tolist()
        self._ranks = {n: max(k, self._least[n]) for n, k in zip(self.names, counts, strict=True)}
        self._coded = self._place < np.array([self._ranks[name] for name in self.names])[self._owner]

    def _worth(self, step: float) -> np.ndarray:
        """Which components lower the error by more than their bits do elsewhere, and those before them in their modules.

        Where a row has many bits, one more for each of its weights takes the error step^2 / 12 of a weight to a quarter: a bit
        is worth ln 2 / 6 step^2. A component at half a bit per weight is never worth it, because both its rows are wrong.
        """
        bits, kept = self._gaussian(step)
        worth = kept * self._worths > math.log(2) / 6 * step**2 * bits
        last = np.full(len(self.names), -1)
        np.maximum.at(last, self._owner[worth], self._place[worth])
        return self._place <= last[self._owner]

    def _estimate(self, step: float, coded: np.ndarray, rising: bool) -> float:
        """Return the relative error, or the bytes, of coding the components `coded`, as for Gaussian weights."""
        if rising:
            return float(np.sqrt(self._lost(step, coded) / max(self._norm, np.finfo(np.float64).tiny)))
        return float(self._gaussian(step)[0][coded].sum() / 8) + _MODULE_BYTES * len(self.names)

    def _lost(self, step: float, coded: np.ndarray) -> float:
        return self._gone + max(float(self._squares.sum() - self._gaussian(step)[1][coded].sum()), 0.0)

    def _gaussian(self, step: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the bits of each component, and by how much it lowers the squared error, as for Gaussian weights.

        A row of n weights of RMS s = sigma / sqrt(n) takes n log2(s sqrt(2 pi e) / step) bits, near zero below, and loses the share
        d = step^2 / 12 s^2 of its square; the product of two rows keeps (1 - d)(1 - d').
        """
        ratios = (self._squares * self._weights)[:, None] / self._widths / step**2
        bits = 0.5 * np.log2(1.0 + 2 * math.pi * math.e * ratios) * self._widths
        kept = 1.0 - np.minimum(1.0 / np.maximum(12 * ratios, 1e-300), 1.0)
        return bits.sum(axis=1), self._squares * kept.prod(axis=1)

    def _invert(self, estimate: Callable[[float], float], target: float, rising: bool) -> float:
        """Return the step size at which an estimate meets the target, by bisection in octaves."""
        low, high = -60.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            finer = estimate(2.0**middle) > target if rising else estimate(2.0**middle) <= target
            low, high = (low, middle) if finer else (middle, high)
        return 2.0 ** ((low + high) / 2)
