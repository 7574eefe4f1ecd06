"""What the controller will be able to see: said before a training begins, when more pictures can still be asked for."""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import Tensor

from ..evaluation.frechet import FeatureStatistics
from ..evaluation.intervals import Measurement, interval_of, jackknife
from ..evaluation.validation import DISTANCES, Validation, distance_floor
from ..settings import AdaptiveSettings
from .controller import slope

__all__ = ["expected_slope_reach", "pictures_warning"]

_COUNTS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # numbers of pictures that may be recommended
_REPEATS = 5  # drawings of which the median is taken: a jackknife of few groups is itself uncertain
_LEAST_REFERENCE = 4  # pictures: fewer do not make the two groups of two that a jackknife needs


def pictures_warning(validation: Validation, settings: AdaptiveSettings) -> str | None:
    """Returns why [adaptive] may never decide anything with so few pictures and how many would do, or None if they are enough.

    What compression costs (fid_gap) depends on how alike the pictures of compressed and full weights are. Only the first
    evaluation knows that, and its reason then names the number of pictures.
    """
    if len(validation.reference) < _LEAST_REFERENCE:
        return (
            f"[adaptive] can decide nothing: {len(validation.reference)} held-out pictures do not tell how sure a distance is; "
            f"set reference in [evaluation] to a folder of {_LEAST_REFERENCE} or more"
        )
    if settings.mode != "fid_trend":
        return None
    count, bound = len(validation.prompts), settings.compress_slope
    reach = expected_slope_reach(validation, settings, count)
    if reach < bound:
        return None
    unit = "" if settings.metric == "fid" else " floors"
    enough = next((more for more in _COUNTS if more > count and expected_slope_reach(validation, settings, more) < bound), None)
    remedy = (
        f"count={enough} in [evaluation] would do"
        if enough is not None
        else f"no count up to {_COUNTS[-1]} is enough: raise window in [adaptive], or use more held-out pictures"
    )
    return (
        f"[adaptive] may decide nothing with {count} pictures: the slope of {settings.metric} over {settings.window} evaluations "
        f"will be known to +/- {reach:.2g}{unit}, unless pictures of successive evaluations are alike, and compressing takes an "
        f"interval within +/- {bound:g}; {remedy}"
    )


def expected_slope_reach(validation: Validation, settings: AdaptiveSettings, count: int) -> float:
    """Returns half of the 95 % interval of the slope that fid_trend will see while nothing changes, in FID or in floors.

    Pictures are drawn from the normal distribution with the mean and covariance of the held-out pictures, anew for each
    evaluation. Those of a training start from the same noise each time, so their interval is narrower.

    Args:
        validation: with the features of the held-out pictures.
        settings: of the controller; its metric and window count.
        count: pictures of an evaluation.
    """
    distances = {validation.extractor.metric(kind): distance for kind, distance in DISTANCES.items()}
    distance, reference = distances[settings.metric], validation.reference
    statistics = FeatureStatistics.of(reference)
    random = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        noise = torch.randn(count, len(statistics.factor), generator=random, dtype=torch.float64)
        return statistics.mean + noise @ statistics.factor / math.sqrt(statistics.count - 1)

    reaches = []
    for _ in range(_REPEATS):
        sets = [drawn() for _ in range(settings.window)]
        measured = [Measurement(distance(each, reference), jackknife(distance, each, reference)) for each in sets]
        low, high = interval_of(lambda values: slope(list(enumerate(values))), measured)
        unit = 1.0 if settings.metric == "fid" else distance_floor(distance, drawn(), drawn())
        reaches.append((high - low) / (2.0 * unit) if unit > 0.0 else math.inf)
    return median(reaches)
