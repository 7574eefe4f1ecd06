"""Before modules are made: how large the file would be, and in which precision a plain one meets its budget."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import SettingsError
from ..quantization import BudgetSearch, ModulePlan
from .context import FileContext, Plan, error_targets
from .encode import Encoder
from .plan import Search, kept_scores, payload_budget, plan
from .precision import PLAIN_NOISE
from .step_search import expected_bytes

__all__ = ["Expected", "expected_size", "plan_in", "surely_larger"]

_FILLED = 0.98  # share of a size that a search for it uses at least
# Least sizes, relative to the expected ones, that were seen on real files; the rest is margin.
_BITS_LEAST, _STEP_SIZE_LEAST = 0.9, 0.7
_MOST_BITS = 8  # of a component, in a search for bits


class Expected(NamedTuple):
    """Bytes of a file: what is expected of it, and what it takes in any case."""

    bytes: int
    least: int


def expected_size(encoder: Encoder, context: FileContext) -> Expected:
    """Return the size of the file that `planning.plan` will choose.

    Exact but for the header where ranks and bits are given. Where an error is asked for, the components that are lost are known by
    their singular values, while what storing the others adds to the error is not, and makes the file larger. The rate of an entropy
    coder is that of Gaussian weights.

    Raises:
        SettingsError: pruning leaves nothing, or the error cannot be reached.
    """
    settings, kept = encoder.settings, kept_scores(encoder, context)
    quantization, budget, search = settings.quantization, settings.budget, settings.quantization.method.search
    everything = {name: ModulePlan(len(scores)) for name, scores in kept.items()}
    payload = payload_budget(encoder, kept)
    if budget.size is None and payload is None and budget.enabled:
        if search is BudgetSearch.STEP_SIZE:
            size = expected_bytes(encoder, kept, context)
            size += context.file_size({}) if encoder.packed else 0
            return Expected(int(size), int(size * _STEP_SIZE_LEAST)) if encoder.packed else Expected(int(size), 0)
        size = _size(encoder, context, Search(encoder, context, kept, False).losing(error_targets(budget, context.parts)))
        return Expected(size, int(size * _BITS_LEAST) if search is BudgetSearch.COMPONENT_BITS else size)
    if quantization.averages and not encoder.packed:
        return Expected(0, 0)  # ranks follow from what coding leaves of the modules
    if search is BudgetSearch.STEP_SIZE:
        size = sys.maxsize  # an entropy coder always finds something to spend bits on
    else:
        size = _size(encoder, context, everything, _MOST_BITS if search is BudgetSearch.COMPONENT_BITS else None)
    if payload is not None:
        size = min(size, context.file_size({}) + payload)
    if budget.size is not None:
        size = min(size, budget.size)
    searched = payload is not None or budget.size is not None
    return Expected(size, int(size * _FILLED) if searched else size)


def _size(encoder: Encoder, context: FileContext, choices: dict[str, ModulePlan], bits: int | None = None) -> int:
    """Bytes of a file of these components, at `bits` each where the choices name none; of a packed file without its index."""
    if not encoder.packed:
        return context.file_size(encoder.outline(choices))
    storage = encoder.settings.quantization
    payload = 0
    for name, choice in choices.items():
        widths = (bits,) * choice.rank if bits else choice.bits
        payload += storage.method.payload_size(choice.rank, *encoder.components[name].shape.stored, storage, widths)
    return context.file_size({}) + payload


def surely_larger(encoder: Encoder, context: FileContext, size: int) -> int | None:
    """Return the bytes to expect of the file if it certainly takes `size` or more, else None."""
    found = expected_size(encoder, context)
    return found.bytes if found.least >= size else None


def plan_in(encoder: Encoder, context: FileContext, precisions: Sequence[torch.dtype]) -> Plan:
    """Plan in the first of some precisions of plain factors in which the budget is met, and leave the job with it.

    Raises:
        SettingsError: it is met in none of them.
    """
    errors = [] if encoder.settings.budget.size is not None or encoder.packed else _errors(encoder, context)
    for precision in precisions[:-1]:
        encoder.dtype = precision
        if any(PLAIN_NOISE.get(precision, 0.0) >= error**2 for error in errors):
            continue  # rounding alone loses more
        try:
            return plan(encoder, context)
        except SettingsError:
            continue
    encoder.dtype = precisions[-1]
    return plan(encoder, context)


def _errors(encoder: Encoder, context: FileContext) -> list[float]:
    return [*error_targets(encoder.settings.budget, context.parts).values()] if encoder.settings.budget.enabled else []
