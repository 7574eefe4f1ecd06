"""The controller: from the history of validation metrics to the next rank_ratio and bits. Pure; whoever trains applies it.

    decision = decide(history, Compression(rank_ratio=0.8, bits=8), AdaptiveSettings())
    decision.compression, decision.action, decision.reason

A history has an entry for each evaluation, the oldest first: {"fid": 31.2}. fid_gap also wants "fid_full", the same with the
uncompressed weights of that step, and the "rank_ratio" and "bits" that were measured. A metric that is not FID comes with its
"floor", the distance of two sets of as many pictures of one source.

Nothing is decided without evidence. An entry says how sure it is by "fid_jackknife" and "fid_full_jackknife", the replicates of
`evaluation.intervals.jackknife`, or by "fid_interval", the two ends of a 95 % interval. From these the rules compute the interval
of what they decide by, and that whole interval must lie within the bounds of a decision. Replicates are much better than
intervals: evaluations draw the same prompts from the same noise, so most of their errors are common to them and cancel.
A number that comes with neither is taken as exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..evaluation.history import Entry, History, measured_gap, measured_value, number, succeeded
from ..evaluation.intervals import interval_of
from ..quantization import STRATEGIES
from ..settings import AdaptiveSettings, allows_bits

__all__ = ["CONTROLLERS", "Compression", "Decision", "adaptive_compression_strategy", "decide", "fid_gap", "slope"]

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

    What decides is the 95 % interval of the slope of the least-squares line through the last `window` values, per evaluation. If
    all of it is above relax_slope (0.5), relax; if all of it is within +/- compress_slope (0.2), compress; otherwise keep.
    Relaxing: rank_ratio + 0.1, at most 0.9; bits + 2, at most 8. Compressing: rank_ratio - 0.05, at least 0.3; bits - 2, at
    least 4. Fewer than 3 measurements change nothing, nor does an evaluation that failed; a failed one before it is left out of
    the line, and the others keep their places.

    The widely copied snippet of this name differs from its own words, and is mended here:
    - its max(bits + 2, 8) makes 8 the least, not the most: 4 jumps to 8, 8 to 10, and so on without end;
    - its max(bits - 2, 4) lifts 2 and 3 bits to 4 when it means to compress, and its min(0.9, rank_ratio + 0.1) lowers a
      rank_ratio above 0.9 when it means to relax: here relaxing never takes and compressing never adds;
    - bits that the strategy cannot take (6 or 8 under nf4) switch it to dynamic, instead of failing at the next save;
    - NaN makes no comparison true and so was read as "keep", infinity as "relax": both are failed evaluations.

    A falling FID stops to fall because training converges, not because of compression: that is what fid_gap is for.
    """
    settings = settings or AdaptiveSettings(mode="fid_trend")
    found = succeeded(metrics_history, lambda entry: measured_value(entry, settings.metric))
    if isinstance(found, str):
        return Decision(current_compression, "keep", found)
    places, values = zip(*found[-settings.window :], strict=True)
    change = slope([(place, value.value) for place, value in zip(places, values, strict=True)])
    low, high = interval_of(lambda numbers: slope(list(zip(places, numbers, strict=True))), values)
    text = f"{settings.metric} changes by {change:+.3g} per evaluation{_interval_text(low, high, '+.3g')}"
    if low > settings.relax_slope:
        return _relaxed(current_compression, settings, text)
    if -settings.compress_slope < low and high < settings.compress_slope:
        return _compressed(current_compression, settings, text)
    if change > settings.relax_slope or abs(change) < settings.compress_slope:
        room = change - settings.relax_slope if change > settings.relax_slope else settings.compress_slope - abs(change)
        text += f"; the interval is too wide to decide{_window_text(settings.window, high - change, room)}"
    return Decision(current_compression, "keep", text)


def fid_gap(metrics_history: History, current_compression: Compression, settings: AdaptiveSettings | None = None) -> Decision:
    """Hold what compression itself costs under max_fid_gap: gap = (FID compressed - FID full) / FID full, same step, same seeds.

    Above max_fid_gap in `patience` evaluations in a row: relax. Under hysteresis * max_fid_gap in as many: compress. The whole
    95 % interval of their mean must lie there too. Only evaluations of the current compression count. One that had to be relaxed,
    and all below it, are not tried again for retry_after evaluations, doubled with each time that it failed: changes become ever
    rarer.

    The gap is relative to the floor where the metric of the full weights is smaller than that. Other settings as in
    `adaptive_compression_strategy`.
    """
    settings = settings or AdaptiveSettings(mode="fid_gap")
    found = succeeded(metrics_history, lambda entry: measured_gap(entry, settings.metric))
    most = settings.hysteresis * settings.max_fid_gap
    if isinstance(found, str):
        return Decision(current_compression, "keep", found + _unsure_text(metrics_history, settings.metric, most))
    begin = _begin(metrics_history, current_compression)
    recent = [measurement for place, measurement in found if place >= begin][-settings.patience :]
    if len(recent) < settings.patience:
        return Decision(current_compression, "keep", f"{len(recent)} of {settings.patience} evaluations of this compression")
    values = [measurement.value for measurement in recent]
    mean = _mean(values)
    low, high = interval_of(_mean, recent)
    text = f"{settings.metric} is {mean:+.1%} from that of the full weights{_interval_text(low, high, '+.1%')}"
    if min(values) > settings.max_fid_gap < low:
        return _relaxed(current_compression, settings, text)
    if max(values) < most > high:
        decision = _compressed(current_compression, settings, text)
        wait = _evaluations_to_wait(metrics_history, decision.compression, settings)
        if decision.action == "compress" and wait > 0:
            return Decision(current_compression, "keep", f"{text}; less had cost too much, tried again in {wait} evaluations")
        return decision
    if min(values) > settings.max_fid_gap or max(values) < most:
        room = mean - settings.max_fid_gap if mean > settings.max_fid_gap else most - mean
        text += f"; the interval is too wide to decide{_pictures_text(metrics_history, high - mean, room)}"
    return Decision(current_compression, "keep", text)


CONTROLLERS: dict[str, Callable[[History, Compression, AdaptiveSettings], Decision]] = {
    "fid_trend": adaptive_compression_strategy,
    "fid_gap": fid_gap,
}


def _interval_text(low: float, high: float, digits: str) -> str:
    return f" (95 % interval {low:{digits}} to {high:{digits}})" if low < high else ""


def slope(points: Sequence[tuple[int, float]]) -> float:
    """Returns the slope of the least-squares line through (place, value) points, per evaluation."""
    middle = math.fsum(place for place, _ in points) / len(points)
    spread = math.fsum((place - middle) ** 2 for place, _ in points)
    return math.fsum((place - middle) * value for place, value in points) / spread


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _unsure_text(history: History, metric: str, most: float) -> str:
    """Returns that the newest gap is less sure than compressing takes, and how many pictures would do, or "" if it is sure."""
    if not history or not math.isfinite((newest := measured_gap(history[-1] or {}, metric)).value):
        return ""
    low, high = interval_of(_mean, [newest])
    reach = (high - low) / 2.0
    text = f"; the gap is known to +/- {reach:.1%}, compressing takes {most:.1%}{_pictures_text(history, reach, most)}"
    return text if reach > most else ""


def _window_text(window: int, reach: float, allowed: float) -> str:
    """Returns how many evaluations a slope needs for half an interval of `allowed`.

    The variance of a slope through w values of equal, independent errors falls as 12 / (w (w^2 - 1)).
    """
    if not (math.isfinite(reach) and allowed > 0.0):
        return ""
    needed = window * (window**2 - 1) * (reach / allowed) ** 2
    return f": window={next(w for w in itertools.count(window + 1) if w * (w**2 - 1) >= needed)} or more pictures would do"


def _pictures_text(history: History, reach: float, allowed: float) -> str:
    """Returns how many pictures an evaluation needs for half an interval of `allowed`: it falls as 1 / sqrt(pictures)."""
    pictures = number(history[-1] or {}, "pictures")
    if not (math.isfinite(pictures) and math.isfinite(reach) and allowed > 0.0):
        return ""
    return f": about {math.ceil(pictures * (reach / allowed) ** 2)} pictures would do"


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
    """Return the bits themselves, perhaps with another strategy that has them, or the next in the direction of the change."""
    if bits is None or bits == current.bits or allows_bits(current.strategy, bits):
        return bits, current.strategy
    strategy = STRATEGIES[current.strategy].at_other_bits or current.strategy
    if allows_bits(strategy, bits):
        return bits, strategy
    steps = range(math.ceil(bits), math.floor(settings.max_bits) + 1) if way > 0 else range(math.floor(bits), 0, -1)
    for candidate in steps:
        if allows_bits(strategy, candidate) and (way > 0 or candidate >= settings.min_bits):
            return candidate, strategy
    return current.bits, current.strategy


def _level(entry: Entry) -> tuple[float, float] | None:
    """The rank_ratio and bits that an entry was measured with, None where it does not say."""
    if entry is None or not math.isfinite(number(entry, "rank_ratio")):
        return None
    bits = number(entry, "bits")
    return round(number(entry, "rank_ratio"), _DIGITS), bits if math.isfinite(bits) else 0.0


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
