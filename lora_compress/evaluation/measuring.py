"""From pictures to numbers: paired measures of the same prompts and noise, and distances from a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import EvaluationError
from .attachment import Lora, rounded
from .extractors import FeatureExtractor
from .frechet import frechet_distance, frechet_infinity
from .intervals import bootstrap_interval, jackknife_interval
from .kernels import clip_mmd, kernel_distance
from .output_error import OutputError, relative_output_error
from .results import Estimate
from .similarity import feature_cosine, load_lpips, structural_similarity
from .studio import Drawings, Studio

__all__ = ["distances", "paired_measures"]

_DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {"fd": frechet_distance, "kd": kernel_distance, "mmd": clip_mmd}
_FEW_GROUPS, _FEW_POINTS = 5, 5
_SUBJECTS = {
    "": "the LoRA's pictures against the data set",
    "_full": "the original LoRA's pictures against the data set",
    "_base": "the base model's pictures against the data set",
}


def paired_measures(
    studio: Studio,
    drawings: Drawings,
    lora: Lora,
    full: Lora | None,
    extractors: Sequence[FeatureExtractor],
    prompts: int,
    device: str,
) -> tuple[list[Estimate], list[str], list[tuple[float, float]]]:
    """Estimates, notes, and the relative output error by timestep; without an original the LoRA is measured against the base."""
    notes: list[str] = []
    measures: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {"ssim": (structural_similarity, "SSIM")}
    for extractor in extractors:
        measures[f"{extractor.name}_cosine"] = (_cosine(extractor), extractor.name)
    try:
        measures["lpips"] = (load_lpips(device), "LPIPS, AlexNet")
    except EvaluationError as error:
        notes.append(f"left out: {error}")
    estimates: list[Estimate] = []
    for name, (measure, looks) in measures.items():
        estimates += _similarities(drawings, name, measure, looks)
    if full is None:
        return estimates, notes, []
    count = min(prompts, drawings.count)
    compared = [lora, rounded(full, torch.bfloat16)]
    runs = [relative_output_error(studio.pipeline, full, compared, *run) for run in studio.runs(count)]
    errors = [OutputError.joined(parts) for parts in zip(*runs, strict=True)]
    curve = list(zip(errors[0].timesteps, errors[0].by_timestep, strict=True))
    return [_output_estimate(errors[0], errors[1], count), *estimates], notes, curve


def distances(drawings: Drawings, extractor: FeatureExtractor, reference: Tensor) -> list[Estimate]:
    """Distances of the pictures from a data set's features (M, d): of the LoRA, of the original, of the base model.

    The floor is what two drawings of the same LoRA from other noise are apart, of N and of as many of M as were drawn: their
    distance, and where that is unbiased, so that it is zero but for chance, the upper end of its interval.
    """
    subjects = {"": drawings.lora, "_full": drawings.full, "_base": drawings.base, "other": drawings.other_seed}
    features = {name: extractor(pictures) for name, pictures in subjects.items() if pictures is not None}
    spare = features.pop("other")
    same = features["_full"] if "_full" in features else features[""]
    estimates = []
    for kind, distance in _DISTANCES.items():
        if kind == "mmd" and extractor.name != "clip":
            continue
        floor = distance(same, spare[: len(reference)])
        if kind != "fd":
            floor = jackknife_interval(distance, same, spare[: len(reference)], value=floor)[1]
        for subject, found in features.items():
            value = distance(found, reference)
            interval = jackknife_interval(distance, found, reference, value=value)
            estimates.append(_distance(extractor, kind, subject, value, interval, len(found), floor, len(reference)))
    return estimates + _extrapolated(features, extractor, reference)


def _extrapolated(features: dict[str, Tensor], extractor: FeatureExtractor, reference: Tensor) -> list[Estimate]:
    """FID at infinitely many pictures, where there are enough to tell, without one of a few groups too."""
    if min(len(reference), len(features[""])) < 2 * reference.shape[1] * _FEW_GROUPS / (_FEW_GROUPS - 1):
        return []
    distance = partial(frechet_infinity, points=_FEW_POINTS)  # a line needs no more, and it is fitted once for each group
    estimates = []
    for subject, found in features.items():
        value = frechet_infinity(found, reference)
        interval = jackknife_interval(distance, found, reference, value=value, groups=_FEW_GROUPS)
        estimates.append(_distance(extractor, "fd", subject, value, interval, len(found), 0.0, len(reference), "_infinity"))
    return estimates


def _distance(
    extractor: FeatureExtractor,
    kind: str,
    subject: str,
    value: float,
    interval: tuple[float, float],
    count: int,
    floor: float,
    against: int,
    suffix: str = "",
) -> Estimate:
    name = extractor.metric(kind) + suffix + subject
    return Estimate(name, value, interval, count, extractor.name, floor, _SUBJECTS[subject], against)


def _similarities(drawings: Drawings, name: str, measure: Callable[[Tensor, Tensor], Tensor], looks: str) -> list[Estimate]:
    """Of the LoRA's pictures with the original's, and of both with the base model's, from the same noise."""
    same = drawings.lora if drawings.full is None else drawings.full
    floor = float(measure(drawings.floor, same).mean())
    pairs = []
    if drawings.full is not None:
        pairs.append((name, drawings.lora, drawings.full, "the same pictures before and after compression"))
        pairs.append((f"{name}_base", drawings.base, drawings.full, "the original LoRA's pictures and those without a LoRA"))
    else:
        pairs.append((f"{name}_base", drawings.base, drawings.lora, "the LoRA's pictures and those without it"))
    if drawings.other_seed is not None:
        pairs.append((f"{name}_other_seed", drawings.other_seed, same, "the same LoRA from other noise"))
    estimates = []
    for own, first, second, meaning in pairs:
        values = measure(first, second)
        interval = bootstrap_interval(values)
        estimates.append(Estimate(own, float(values.mean()), interval, len(values), looks, floor, meaning))
    return estimates


def _output_estimate(error: OutputError, floor: OutputError, count: int) -> Estimate:
    interval = bootstrap_interval(error.by_prompt, lambda means: (means[:, 0] / means[:, 1]).sqrt())
    meaning = f"||eps_c - eps_o|| / ||eps_o - eps_b|| over {len(error.timesteps)} timesteps"
    return Estimate("relative_output_error", error.value, interval, count, "the denoiser", floor.value, meaning)


def _cosine(extractor: FeatureExtractor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda first, second: feature_cosine(extractor(first), extractor(second))
