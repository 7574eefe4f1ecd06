"""Reads the entries of a history of evaluations with what is known of their errors, for the controller to decide by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

from .intervals import Measurement, interval_of

__all__ = ["Entry", "History", "measured_gap", "measured_value", "number", "succeeded"]

Entry = Mapping[str, Any] | None  # None, NaN, infinity or no value: the evaluation failed
History = Sequence[Entry]

_LEAST = 3  # measurements before anything changes
_DEVIATIONS = 2 * NormalDist().inv_cdf(0.975)  # standard deviations that a 95 % interval is wide


def succeeded(history: History, read: Callable[[Mapping[str, Any]], Measurement]) -> list[tuple[int, Measurement]] | str:
    """Returns (place, measurement) of the evaluations that succeeded, or in a few words why nothing can be decided.

    Args:
        history: entries, the oldest first.
        read: from an entry to what is followed, `measured_value` or `measured_gap`.
    """
    every = [Measurement(math.nan) if entry is None else read(entry) for entry in history]
    found = [(place, measurement) for place, measurement in enumerate(every) if math.isfinite(measurement.value)]
    if every and not math.isfinite(every[-1].value):
        return "the last evaluation failed"
    if len(found) < _LEAST:
        return f"{len(found)} of {_LEAST} measurements"
    return found


def measured_value(entry: Mapping[str, Any], metric: str) -> Measurement:
    """Returns the metric; one that is not FID in units of its floor, so that one threshold serves all of them."""
    measurement, floor = _measurement(entry, metric), number(entry, "floor")
    if metric == "fid":
        return measurement
    if not floor > 0.0:
        return Measurement(math.nan)
    replicates = tuple(tuple(value / floor for value in side) for side in measurement.replicates)
    return Measurement(measurement.value / floor, replicates, measurement.deviation / floor)


def measured_gap(entry: Mapping[str, Any], metric: str) -> Measurement:
    """Returns (compressed - full) / full of a metric, relative to the floor where the full weights are below it.

    Where both have replicates these are combined one by one: the same pictures are left out of both, and so what chance did to
    both drawings alike cancels.
    """
    compressed, full, floor = _measurement(entry, metric), _measurement(entry, f"{metric}_full"), number(entry, "floor")

    def relative(value: float, base: float) -> float:
        least = max(base, floor) if math.isfinite(floor) else base
        return (value - base) / least if least > 0.0 else math.nan

    value = relative(compressed.value, full.value)
    if compressed.replicates and list(map(len, compressed.replicates)) == list(map(len, full.replicates)):
        sides = zip(compressed.replicates, full.replicates, strict=True)
        return Measurement(value, tuple(tuple(map(relative, *side)) for side in sides))
    low, high = interval_of(lambda values: relative(*values), [compressed, full])
    return Measurement(value, deviation=(high - low) / _DEVIATIONS)


def number(entry: Mapping[str, Any], name: str) -> float:
    """Returns a number of an entry, NaN where there is none."""
    value = entry.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _measurement(entry: Mapping[str, Any], name: str) -> Measurement:
    """Returns a number of an entry with its replicates, or else with the error that its interval stands for."""
    value = number(entry, name)
    if replicates := entry.get(f"{name}_jackknife"):
        return Measurement(value, tuple(tuple(map(float, side)) for side in replicates))
    if interval := entry.get(f"{name}_interval"):
        low, high = (math.inf if end is None else float(end) for end in interval)
        return Measurement(value, deviation=(high - low) / _DEVIATIONS if math.isfinite(low) and math.isfinite(high) else math.inf)
    return Measurement(value)
