"""The controller: from the history of validation metrics to the next rank_ratio and bits. Pure; whoever trains applies it.

    decision = decide(history, Compression(rank_ratio=0.8, bits=8), AdaptiveSettings())
    decision.compression, decision.action, decision.reason

A history has an entry for each evaluation, the oldest first: {"fid": 31.2}. fid_gap also wants "fid_full", the same with the
uncompressed weights of that step, and the "rank_ratio" and "bits" that were measured. A metric that is not FID comes with its
"floor", the distance of two sets of as many pictures of one source.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .settings import AdaptiveSettings, allows_bits

__all__ = ["CONTROLLERS", "Compression", "Decision", "adaptive_compression_strategy", "decide", "fid_gap"]

Entry = Mapping[str, Any] | None  # None, NaN, infinity or no value: the evaluation failed
History = Sequence[Entry]

_LEAST = 3  # measurements before anything changes
_DIGITS = 6  # of rank_ratio: 0.75 + 0.05 is 0.8


@dataclass(frozen=True)
class Compression:
    """How strongly a LoRA is compressed.

    Args:
        rank_ratio: components kept / all components.
        bits: per stored weight; None where a budget decides about them: they stay as they are.
        strategy: of quantization.
    """

    rank_ratio: float
    bits: float | None
    strategy: str = "dynamic"


@dataclass(frozen=True)
class Decision:
    """What to do from the next step on.

    Args:
        compression: to use.
        action: relax, compress or keep.
        reason: one sentence for the log.
    """

    compression: Compression
    action: str
    reason: str


def decide(metrics_history: History, current_compression: Compression, settings: AdaptiveSettings) -> Decision:
    """What the controller of `settings.mode` says."""
    return CONTROLLERS[settings.mode](metrics_history, current_compression, settings)


def adaptive_compression_strategy(
    metrics_history: History, current_compression: Compression, settings: AdaptiveSettings | None = None
) -> Decision:
    """Follow the trend of the validation FID: mode fid_trend.

    With the slope of the least-squares line through the last `window` values, per evaluation: above relax_slope (0.5) relax,
    within +/- compress_slope (0.2) compress, otherwise keep. Relaxing: rank_ratio + 0.1, at most 0.9; bits + 2, at most 8.
    Compressing: rank_ratio - 0.05, at least 0.3; bits - 2, at least 4. Fewer than 3 measurements change nothing, nor does an
    evaluation that failed; a failed one before it is left out of the line, and the others keep their places.

    The widely copied snippet of this name differs from its own words, and is mended here:
    - its max(bits + 2, 8) makes 8 the least, not the most: 4 jumps to 8, 8 to 10, and so on without end;
    - its max(bits - 2, 4) lifts 2 and 3 bits to 4 when it means to compress, and its min(0.9, rank_ratio + 0.1) lowers a
      rank_ratio above 0.9 when it means to relax: here relaxing never takes and compressing never adds;
    - bits that the strategy cannot take (6 or 8 under nf4) switch it to dynamic, instead of failing at the next save;
    - NaN makes no comparison true and so was read as "keep", infinity as "relax": both are failed evaluations.

    A falling FID stops to fall because training converges, not because of compression: that is what fid_gap is for.
    """
    settings = settings or AdaptiveSettings(mode="fid_trend")
    found = _measured(metrics_history, lambda entry: _in_units(entry, settings))
    if isinstance(found, str):
        return Decision(current_compression, "keep", found)
    slope = _slope(found[-settings.window :])
    text = f"{settings.metric} changes by {slope:+.3g} per evaluation"
    if slope > settings.relax_slope:
        return _relaxed(current_compression, settings, text)
    if abs(slope) < settings.compress_slope:
        return _compressed(current_compression, settings, text)
    return Decision(current_compression, "keep", text)


def fid_gap(metrics_history: History, current_compression: Compression, settings: AdaptiveSettings | None = None) -> Decision:
    """Hold what compression itself costs under max_fid_gap: gap = (FID compressed - FID full) / FID full, same step, same seeds.

    Above max_fid_gap in `patience` evaluations in a row: relax. Under hysteresis * max_fid_gap in as many: compress. Only
    evaluations of the current compression count. One that had to be relaxed, and all below it, are not tried again for
    retry_after evaluations, doubled with each time that it failed: changes become ever rarer.

    The gap is relative to the floor where the metric of the full weights is smaller than that. Other settings as in
    `adaptive_compression_strategy`.
    """
    settings = settings or AdaptiveSettings(mode="fid_gap")
    found = _measured(metrics_history, lambda entry: _gap(entry, settings.metric))
    if isinstance(found, str):
        return Decision(current_compression, "keep", found)
    begin = _begin(metrics_history, current_compression)
    gaps = [gap for place, gap in found if place >= begin]
    text = f"{settings.metric} is {gaps[-1]:+.1%} from that of the full weights" if gaps else "nothing measured yet"
    recent = gaps[-settings.patience :]
    if len(recent) < settings.patience:
        return Decision(current_compression, "keep", f"{text}; {len(recent)} of {settings.patience} evaluations")
    if min(recent) > settings.max_fid_gap:
        return _relaxed(current_compression, settings, text)
    if max(recent) < settings.hysteresis * settings.max_fid_gap:
        decision = _compressed(current_compression, settings, text)
        wait = _evaluations_to_wait(metrics_history, decision.compression, settings)
        if decision.action == "compress" and wait > 0:
            return Decision(current_compression, "keep", f"{text}; less had cost too much, tried again in {wait} evaluations")
        return decision
    return Decision(current_compression, "keep", text)


CONTROLLERS: dict[str, Callable[[History, Compression, AdaptiveSettings], Decision]] = {
    "fid_trend": adaptive_compression_strategy,
    "fid_gap": fid_gap,
}


def _measured(history: History, value: Callable[[Mapping[str, Any]], float]) -> list[tuple[int, float]] | str:
    """(place, value) of the evaluations that succeeded, or why nothing can be decided."""
    values = [math.nan if entry is None else value(entry) for entry in history]
    found = [(place, value) for place, value in enumerate(values) if math.isfinite(value)]
    if values and not math.isfinite(values[-1]):
        return "the last evaluation failed"
    if len(found) < _LEAST:
        return f"{len(found)} of {_LEAST} measurements"
    return found


def _number(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _in_units(entry: Mapping[str, Any], settings: AdaptiveSettings) -> float:
    """The metric; one that is not FID in units of its floor, which thresholds can then be the same for."""
    value, floor = _number(entry, settings.metric), _number(entry, "floor")
    if settings.metric == "fid":
        return value
    return value / floor if floor > 0.0 else math.nan


def _gap(entry: Mapping[str, Any], metric: str) -> float:
    value, full, floor = _number(entry, metric), _number(entry, f"{metric}_full"), _number(entry, "floor")
    least = max(full, floor) if math.isfinite(floor) else full
    return (value - full) / least if least > 0.0 else math.nan


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Of the least-squares line, by the distance of places."""
    middle = math.fsum(place for place, _ in points) / len(points)
    spread = math.fsum((place - middle) ** 2 for place, _ in points)
    return math.fsum((place - middle) * value for place, value in points) / spread


def _relaxed(current: Compression, settings: AdaptiveSettings, reason: str) -> Decision:
    ratio = max(current.rank_ratio, min(current.rank_ratio + settings.relax_rank, settings.max_rank_ratio))
    bits = current.bits
    if bits is not None:
        bits = max(bits, min(bits + settings.relax_bits, settings.max_bits))
    return _moved(current, ratio, bits, 1, "relax", reason, settings)


def _compressed(current: Compression, settings: AdaptiveSettings, reason: str) -> Decision:
    ratio = min(current.rank_ratio, max(current.rank_ratio - settings.compress_rank, settings.min_rank_ratio))
    bits = current.bits
    if bits is not None:
        bits = min(bits, max(bits - settings.compress_bits, settings.min_bits))
    return _moved(current, ratio, bits, -1, "compress", reason, settings)


def _moved(
    current: Compression, ratio: float, bits: float | None, way: int, action: str, reason: str, settings: AdaptiveSettings
) -> Decision:
    bits, strategy = _possible_bits(current, bits, way, settings)
    moved = Compression(round(ratio, _DIGITS), bits, strategy)
    if moved == replace(current, rank_ratio=round(current.rank_ratio, _DIGITS)):
        return Decision(current, "keep", f"{reason}; nothing left to {action} within the bounds")
    changes = [f"rank_ratio {current.rank_ratio:g} -> {moved.rank_ratio:g}"] if moved.rank_ratio != current.rank_ratio else []
    if moved.bits != current.bits:
        changes.append(f"bits {current.bits:g} -> {moved.bits:g}")
    if strategy != current.strategy:
        changes.append(f"strategy {current.strategy} -> {strategy}, because {current.strategy} has no {moved.bits:g} bits")
    return Decision(moved, action, f"{reason}: {', '.join(changes)}")


def _possible_bits(current: Compression, bits: float | None, way: int, settings: AdaptiveSettings) -> tuple[float | None, str]:
    """The bits themselves, dynamic with them, or the next that can be had in the direction of the change."""
    if bits is None or bits == current.bits or allows_bits(current.strategy, bits):
        return bits, current.strategy
    if current.strategy == "nf4" and allows_bits("dynamic", bits):
        return bits, "dynamic"
    strategy = "dynamic" if current.strategy == "nf4" else current.strategy
    steps = range(math.ceil(bits), math.floor(settings.max_bits) + 1) if way > 0 else range(math.floor(bits), 0, -1)
    for candidate in steps:
        if allows_bits(strategy, candidate) and (way > 0 or candidate >= settings.min_bits):
            return candidate, strategy
    return current.bits, current.strategy


def _level(entry: Entry) -> tuple[float, float] | None:
    """The rank_ratio and bits that an entry was measured with, None where it does not say."""
    if entry is None or not math.isfinite(_number(entry, "rank_ratio")):
        return None
    bits = _number(entry, "bits")
    return round(_number(entry, "rank_ratio"), _DIGITS), bits if math.isfinite(bits) else 0.0


def _begin(history: History, current: Compression) -> int:
    """Where the evaluations of the current compression begin; those that do not say what they measured count for it."""
    now = (round(current.rank_ratio, _DIGITS), current.bits or 0.0)
    for place in range(len(history), 0, -1):
        level = _level(history[place - 1])
        if level is not None and level != now:
            return place
    return 0


def _evaluations_to_wait(history: History, target: Compression, settings: AdaptiveSettings) -> int:
    """Evaluations until `target` may be tried: how often it, or anything milder, has failed decides."""
    levels = [(place, level) for place, level in enumerate(map(_level, history)) if level is not None]
    goal = (round(target.rank_ratio, _DIGITS), target.bits or 0.0)
    failures = [
        place
        for (_, before), (place, after) in itertools.pairwise(levels)
        if before != after and _within(before, after) and _within(goal, before)
    ]
    if not failures:
        return 0
    return settings.retry_after * 2 ** (len(failures) - 1) - (len(history) - failures[-1])


def _within(level: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a level compresses at least as strongly as another."""
    return level[0] <= other[0] and level[1] <= other[1]
