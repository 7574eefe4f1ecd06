"""The second step of the road, plan: rank, and bits or step size, of every module, chosen over all of them for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..allocation import (
    bits_for_error,
    bits_for_size,
    common_ranks_for_error,
    common_ranks_for_size,
    ranks_for_error,
    ranks_for_size,
)
from ..errors import SettingsError
from ..packed.index import ModuleRecord
from ..pruning import select_ranks
from ..quantization import BudgetSearch, ModulePlan
from ..update import relative_error
from .context import FileContext, Plan, error_targets, payload_size, require_room
from .encode import EncodedModule, Encoder
from .precision import PLAIN_NOISE
from .step_search import fit_steps

__all__ = ["Search", "kept_scores", "payload_budget", "plan"]

_ATTEMPTS = 12  # at meeting a budget; two or three are usual
_TIGHTER = 0.99  # the error to prune to, where a target was missed by less than a component is worth
_CLOSE = 0.01  # share of a budget that may be left
_HALVINGS = 24  # of the errors between which one is sought
_INDEX_BYTES = 22  # of a module in the index of a packed file, compressed
_ENTRY_BYTES = 68  # of a tensor in a header, its key apart


def plan(encoder: Encoder, context: FileContext) -> Plan:
    """Choose a plan for each module: what pruning leaves, cut further to the size or the error that is asked for.

    Raises:
        SettingsError: the budget cannot be met, or nothing is left.
    """
    settings, kept = encoder.settings, kept_scores(encoder, context)
    if not settings.budget.enabled and not settings.quantization.averages:
        return Plan({name: ModulePlan(len(scores)) for name, scores in kept.items()})
    payload = payload_budget(encoder, kept)
    if settings.quantization.method.search is BudgetSearch.STEP_SIZE:
        found = fit_steps(encoder, kept, context, payload)
        return found if encoder.packed else _of_what_is_left(found)
    search = Search(encoder, context, kept, payload is not None)
    if payload is not None:
        return search.for_size(payload, payload_size)
    return search.for_error() if settings.budget.size is None else search.for_size(settings.budget.size, context.file_size)


def kept_scores(encoder: Encoder, context: FileContext) -> dict[str, Tensor]:
    """Return the scores of the components that pruning leaves of each module, (k,).

    Raises:
        SettingsError: it leaves nothing.
    """
    scores = {name: analysis.scores for name, analysis in encoder.components.items()}
    relative = {name: score * context.weights.get(name, 1.0) ** 0.5 for name, score in scores.items()}
    kernels = {name: analysis.shape.kernel for name, analysis in encoder.components.items()}
    ranks = select_ranks(relative, encoder.settings.pruning, kernels, context.protected)
    if scores and not any(ranks.values()):
        raise SettingsError(["pruning removes every module: choose smaller thresholds"])
    return {name: score[: ranks[name]] for name, score in scores.items()}


def _of_what_is_left(found: Plan) -> Plan:
    """Return the plan for a plain file, without the modules and components that coding rounded to zero."""
    stored = found.stored or {}
    return Plan({name: replace(found.choices[name], left=module.rank) for name, module in stored.items()})


def payload_budget(encoder: Encoder, kept: Mapping[str, Tensor]) -> int | None:
    """Return the bytes of payload that an average number of bits means; None where a size or an error is asked for."""
    bits = encoder.settings.quantization.bits
    if bits is None or not encoder.settings.quantization.averages:
        return None
    return int(sum(len(scores) * sum(encoder.components[name].shape.stored) for name, scores in kept.items()) * bits / 8)


class Search:
    """Finds ranks, or ranks and bits, for a budget: allocate by the singular values, encode, correct by the result, repeat.

    Args:
        payload: the budget is one of codes alone, whatever file they are in.
    """

    def __init__(self, encoder: Encoder, context: FileContext, kept: Mapping[str, Tensor], payload: bool) -> None:
        self.encoder, self.context, self.kept, self.payload = encoder, context, kept, payload
        self.index_bytes = 0 if payload else _INDEX_BYTES
        self._storage, self._method = encoder.settings.quantization, encoder.settings.quantization.method
        self._by_bits = self._method.search is BudgetSearch.COMPONENT_BITS
        # The share of a component's square that is left where both factors are coded in so many bits.
        self._left = {bits: 1 - 2 * d - d**2 for bits, d in self._method.distortions.items()}
        sigmas = {name: encoder.components[name].spectrum.sigma[: len(scores)] for name, scores in kept.items()}
        self._weighed = bool(context.weights) or any(not scores.equal(sigmas[name]) for name, scores in kept.items())

    def for_size(self, budget: int, measure: Callable[[Mapping[str, EncodedModule]], int]) -> Plan:
        """Return the plan of the least error whose measure is at most `budget`.

        Raises:
            SettingsError: the budget is too small.
        """
        require_room(budget, measure({}))
        inner, best, most, tried, size, over = budget, None, -1, None, 0, 0
        for _ in range(_ATTEMPTS):
            choices = self._allocate(inner, {})
            if choices == tried and (best is not None or size > budget + inner // 2):
                break
            if choices != tried:
                stored, tried = self._make(choices) if self.encoder.packed else self.encoder.outline(choices), choices
                found, size = Plan(choices, stored if self.encoder.packed else None), measure(stored)
            if most < size <= budget:
                best, most = found, size
            if budget * (1 - _CLOSE) <= size <= budget:
                break
            over += size > budget
            inner += budget - size - (min(2**over, 500) * budget // 1000 if size > budget else 0)  # a few bytes change nothing
        if best is None:
            raise SettingsError([f"{budget} bytes are too few: the least that was reached is {size}; take a larger target_size"])
        return best

    def for_error(self) -> Plan:
        """Return the plan of the fewest bytes at the errors that are asked for.

        The squared error that coding adds is taken off the target before ranks are allocated.

        Raises:
            SettingsError: the errors cannot be reached.
        """
        wanted = error_targets(self.encoder.settings.budget, self.context.parts)
        noise = self._noise()
        inner = {part: _less(target, noise) for part, target in wanted.items()}
        best, most, tried = None, -1.0, None
        for _ in range(_ATTEMPTS):
            try:
                choices = self.losing(inner)
            except SettingsError:
                if tried is None:
                    raise
                break  # nothing stricter is possible: what was reached tells more than the reason
            if choices == tried:
                if best is not None:
                    break
                inner = {part: _TIGHTER * error for part, error in inner.items()}  # by less than a component: ask for one more
                continue
            stored, tried = self._make(choices), choices
            found = Plan(choices, stored if self.encoder.packed else None)
            reached = {part: self._error(stored, part) for part in wanted}
            if all(reached[part] <= target for part, target in wanted.items()) and sum(reached.values()) > most:
                best, most = found, sum(reached.values())
                if any(reached[part] >= (1 - _CLOSE) * target for part, target in wanted.items()):
                    break
            inner = {part: _less(target, (reached[part] ** 2 - inner[part] ** 2)) for part, target in wanted.items()}
        if best is None:
            told = ", ".join(f"{reached[part]:.4g} for {part or 'the whole file'}" for part in wanted)
            raise SettingsError([f"the error that is asked for was not reached, {told} was: take more bits or a larger error"])
        return best

    def losing(self, errors: Mapping[str, float]) -> dict[str, ModulePlan]:
        """Return the plans that lose what is asked for, by the singular values.

        Allocation counts in scores and weights. Where these are not the singular values, an error of theirs is sought, by halves,
        at which the error of the weights is the one that is meant.

        Raises:
            SettingsError: so little cannot be lost.
        """
        if not self._weighed:
            return self._allocate(None, errors)
        low, high = dict.fromkeys(errors, 0.0), dict.fromkeys(errors, 1.0)
        for _ in range(_HALVINGS):
            middle = {part: (low[part] + high[part]) / 2 for part in errors}
            try:
                choices = self._allocate(None, middle)
            except SettingsError:  # so little cannot be lost
                low = middle
                continue
            lost = {name: self._predicted_loss(name, choice) for name, choice in choices.items()}
            for part, error in errors.items():
                edge = low if self._relative(lost, part) <= error else high
                edge[part] = middle[part]
        return self._allocate(None, low)

    def _predicted_loss(self, name: str, choice: ModulePlan) -> float:
        """Return the squared error of a module's weights by its singular values and the known distortion of its bits."""
        analysis = self.encoder.components[name]
        squares = analysis.spectrum.sigma[: choice.rank].square().numpy()
        kept = squares @ np.array([self._left[bits] for bits in choice.bits]) if choice.bits else squares.sum()
        return max(analysis.norm - float(kept), 0.0)

    def _allocate(self, size: int | None, errors: Mapping[str, float]) -> dict[str, ModulePlan]:
        context = self.context
        parts = {part: error for part, error in errors.items() if part}
        common: dict[str, Any] = {"weights": context.weights, "protected": context.protected}
        if self._by_bits:
            widths = {name: sum(self.encoder.components[name].shape.stored) for name in self.kept}
            common |= {"overhead": dict.fromkeys(self.kept, self.index_bytes), "component_bytes": self._bytes}
            if size is not None:
                bits = bits_for_size(self.kept, widths, self._method.distortions, size, **common)
            else:
                more: dict[str, Any] = {"part_errors": parts, "parts": context.parts}
                bits = bits_for_error(self.kept, widths, self._method.distortions, errors.get(""), **more, **common)
            return {name: ModulePlan(len(b), b) for name, b in bits.items()}
        costs = {name: self._bytes(name) for name in self.kept}
        shapes = {name: self.encoder.components[name].shape for name in self.kept}
        fixed = {name: self.index_bytes if self.encoder.packed else _plain_overhead(shape) for name, shape in shapes.items()}
        common |= {"min_rank_stored": 1 if self.encoder.packed else 2}
        common |= {"min_rank": self.encoder.settings.pruning.min_rank or 0}
        padded = context.one_rank and not self.encoder.packed  # components of zeros are paid for
        if size is not None:
            for_size = partial(common_ranks_for_size, parts=context.parts) if padded else ranks_for_size
            ranks = for_size(self.kept, costs, fixed, size, **common)
        else:
            more = {"part_errors": parts, "parts": context.parts}
            for_error = common_ranks_for_error if padded else ranks_for_error
            ranks = for_error(self.kept, costs, fixed, errors.get(""), **more, **common)
        return {name: ModulePlan(rank) for name, rank in ranks.items()}

    def _bytes(self, name: str, bits: int | None = None) -> int:
        """Return the bytes of one component of a module."""
        shape = self.encoder.components[name].shape
        if (self.encoder.packed or self.payload) and self._storage.enabled:
            return self._method.component_size(*shape.stored, self._storage, bits)
        return (shape.outputs + shape.inputs * math.prod(shape.kernel)) * self.encoder.dtype.itemsize

    def _make(self, choices: Mapping[str, ModulePlan]) -> dict[str, EncodedModule]:
        return {name: stored.without_factors() for name, stored in self.encoder.run(choices)}

    def _error(self, stored: Mapping[str, EncodedModule], part: str) -> float:
        return self._relative({name: module.squared_error for name, module in stored.items()}, part)

    def _relative(self, lost: Mapping[str, float], part: str) -> float:
        """Return the relative error over a part of the model by the modules' squared errors; modules without one are dropped."""
        norms = {n: self.encoder.components[n].norm for n in self.kept if not part or self.context.parts[n] == part}
        return relative_error(sum(lost.get(name, norm) for name, norm in norms.items()), sum(norms.values()))

    def _noise(self) -> float:
        """Return the squared relative error that storing adds, as a first guess."""
        if self._by_bits:
            return 0.0
        if self._storage.enabled:
            return 2 * self._method.distortions[int(self._storage.bits or 8)]
        return PLAIN_NOISE.get(self.encoder.dtype, 0.0)


def _less(target: float, squared: float) -> float:
    """Return sqrt(target^2 - squared), kept above zero: a target that coding alone exceeds is tried with hardly any pruning."""
    return max(target**2 - squared, 1e-4 * target**2) ** 0.5


def _plain_overhead(shape: ModuleRecord) -> int:
    """Return the bytes of a module's alpha and of its entries in the header, for offsets of nine digits."""
    keys = shape.keys.specs(shape.name, (1, shape.inputs, *shape.kernel), (shape.outputs, 1), torch.float32)
    return sum(len(key) + _ENTRY_BYTES for key in keys) + 4
