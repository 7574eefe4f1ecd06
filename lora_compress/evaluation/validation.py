"""Measures of a training's own pictures: prompts and held-out features before it begins, an entry of the history each time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import EvaluationError, FormatError
from ..files.writer import atomic_path
from ..settings import EvaluationSettings
from ..settings.cache_folder import cache_folder
from .extractors import FeatureExtractor, load_extractor
from .frechet import frechet_distance
from .intervals import Measurement, interval_of, jackknife, jackknife_interval
from .kernels import kernel_distance
from .pictures import PictureFolder, read_pictures
from .prompts import read_prompts
from .reference import reference_features

__all__ = ["DISTANCES", "Validation", "comparable", "distance_floor", "read_history", "write_history"]

DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {"fd": frechet_distance, "kd": kernel_distance}
_CIRCUMSTANCES = ("extractor", "pictures", "reference", "size", "steps")  # of a measurement, besides the weights
_OTHER_SEEDS = 1_000_003  # added to a seed: noise that no other picture starts from


@dataclass(frozen=True)
class Validation:
    """What is drawn and what it is measured against; the extractor runs on the CPU and leaves the GPU's memory to the training.

    Args:
        settings: of the section [evaluation].
        prompts: one for each picture.
        extractor: of features.
        reference: features (M, d) of the held-out pictures.
    """

    settings: EvaluationSettings
    prompts: tuple[str, ...]
    extractor: FeatureExtractor
    reference: Tensor

    @classmethod
    def prepare(cls, settings: EvaluationSettings, split: PictureFolder | None = None) -> Validation:
        """Read the held-out pictures and load the extractor: all that can be wrong with either is told here.

        Args:
            settings: of the section [evaluation].
            split: the host's validation split, where it has one; used where the settings name no folder.

        Raises:
            EvaluationError: there are no held-out pictures, captions or prompts, or the extractor's weights cannot be had.
        """
        given = read_prompts(settings.prompts) if settings.prompts is not None else None
        if settings.reference is not None:
            pictures = read_pictures(settings.reference, resolution=settings.size, captions=given is None)
        elif split is not None and len(split) >= 2:
            pictures = PictureFolder(split.paths, split.captions, settings.size)
        else:
            found = f"{len(split)} picture{'s' * (len(split) != 1)}" if split is not None else "no validation split"
            raise EvaluationError(f"[evaluation]: {found} to measure against: set reference to a folder, or raise validation_split")
        captions = pictures.captions if given is None else tuple(given)
        if missing := [path.name for path, text in zip(pictures.paths, captions, strict=False) if given is None and not text]:
            raise EvaluationError(f"[evaluation]: {missing[0]} has no caption to draw from: write one, or set prompts to a file")
        extractor = load_extractor(settings.extractor, settings.extractor_weights)
        return cls(settings, _spread(captions, settings.count), extractor, reference_features(pictures, extractor, cache_folder()))

    @property
    def metric(self) -> str:
        """The distance that is told first: fid, or <extractor>_fd."""
        return self.extractor.metric("fd")

    @property
    def metrics(self) -> list[str]:
        """Names of all distances that are told."""
        return [self.extractor.metric(kind) for kind in DISTANCES]

    def distances(self, features: Tensor, suffix: str = "") -> dict[str, Any]:
        """Returns each distance of features (N, d) to the reference as <metric><suffix>, and its jackknife replicates as
        <metric><suffix>_jackknife: a list for the pictures and one for the reference.

        Raises:
            EvaluationError: features are NaN or infinite.
        """
        found: dict[str, Any] = {}
        for kind, distance in DISTANCES.items():
            name = self.extractor.metric(kind) + suffix
            found[name] = distance(features, self.reference)
            found[f"{name}_jackknife"] = [list(side) for side in jackknife(distance, features, self.reference)]
        return found

    def host_prompts(self, *, other_noise: bool = False) -> list[dict[str, Any]]:
        """The pictures as sd-scripts' prompt files have them; `other_noise`: from seeds that are used nowhere else."""
        settings, shift = self.settings, _OTHER_SEEDS if other_noise else 0
        optional = {"scale": settings.guidance, "guidance_scale": settings.embedded_guidance}
        same: dict[str, Any] = {"width": settings.size, "height": settings.size, "sample_steps": settings.steps}
        same |= {key: value for key, value in optional.items() if value is not None}
        return [
            {"prompt": prompt, "seed": settings.first_seed + shift + index, **same} for index, prompt in enumerate(self.prompts)
        ]

    def known_floors(self, history: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
        """Floors of an earlier entry whose numbers can be compared with ours; None where they are still to be measured."""
        names = [f"{name}_floor" for name in self.metrics]
        for entry in reversed(history):
            if all(name in entry for name in names) and comparable(entry, self._circumstances()):
                return {name: entry[name] for name in names}
        return None

    def measure(self, features: Tensor, floors: Mapping[str, float] | Tensor) -> dict[str, Any]:
        """An entry of the history: distances with their jackknife replicates, their intervals, null where there are too few
        pictures for one, and their floors.

        Args:
            features: (N, d) of the pictures.
            floors: of an earlier entry, or features (N, d) of the same pictures from other noise: a floor is what two drawings
                are apart; of the unbiased distance the upper end of its interval.

        Raises:
            EvaluationError: features are NaN or infinite.
        """
        entry: dict[str, Any] = self._circumstances() | self.distances(features)
        for kind, distance in DISTANCES.items():
            name = self.extractor.metric(kind)
            measured = Measurement(entry[name], tuple(map(tuple, entry[f"{name}_jackknife"])))
            interval = interval_of(lambda values: values[0], [measured])
            entry[f"{name}_interval"] = [end if math.isfinite(end) else None for end in interval]
            if isinstance(floors, Tensor):
                entry[f"{name}_floor"] = distance_floor(distance, features, floors)
            else:
                entry[f"{name}_floor"] = floors[f"{name}_floor"]
        return entry

    def plain_numbers(self, entry: Mapping[str, Any]) -> dict[str, float]:
        """Distances, their floors and those of the uncompressed weights by name, for trackers; {} of an evaluation that failed."""
        kinds = ("", "_floor", "_full")
        return {key: entry[key] for name in self.metrics for key in (name + kind for kind in kinds) if key in entry}

    def _circumstances(self) -> dict[str, Any]:
        settings = self.settings
        values = (settings.extractor, len(self.prompts), len(self.reference), settings.size, settings.steps)
        return dict(zip(_CIRCUMSTANCES, values, strict=True))


def distance_floor(distance: Callable[[Tensor, Tensor], float], first: Tensor, second: Tensor) -> float:
    """Returns what two drawings from different noise are apart; of a distance that is unbiased the upper end of its interval.

    Args:
        distance: of two sets of features.
        first: features (N, d) of one drawing.
        second: features (N, d) of the other drawing.
    """
    value = distance(first, second)
    return value if distance is frechet_distance else jackknife_interval(distance, first, second, value=value)[1]


def comparable(entry: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether two entries of a history were measured in the same way: numbers of pictures, size, steps and extractor."""
    return all(entry.get(name) == other.get(name) for name in _CIRCUMSTANCES)


def write_history(path: str | os.PathLike[str], history: Sequence[Mapping[str, Any]]) -> None:
    """Write entries as JSON lines, the oldest first; whole or not at all.

    Raises:
        SaveError: it cannot be written.
    """
    with atomic_path(Path(path)) as temporary:
        lines = [json.dumps(entry, allow_nan=False, ensure_ascii=False) + "\n" for entry in history]
        Path(temporary).write_text("".join(lines), encoding="utf-8")


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a file of `write_history`; [] where there is none.

    Raises:
        FormatError: it holds something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: is no history of evaluations ({error}): remove it to begin a new one") from error
    if not all(isinstance(entry, dict) for entry in entries):
        raise FormatError(f"{path}: is no history of evaluations (a line is no object): remove it to begin a new one")
    return entries


def _spread(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` prompts: evenly spaced where there are more, over and over where there are fewer."""
    have = len(prompts)
    return tuple(prompts[index * have // count if have > count else index % have] for index in range(count))
