"""What an evaluation found: every number with how many pictures it is of, who looked at them and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Estimate", "Evaluation"]


@dataclass(frozen=True)
class Estimate:
    """One number.

    Args:
        name: of the metric, such as fid, probe_kd, ssim; with _full the same of the LoRA before compression, with _base of the base
            model without one, with _other_seed of the original LoRA's pictures from other noise.
        value: of it.
        interval: that holds the true value in 95 of 100 cases.
        count: pictures, or prompts, N.
        extractor: of features, or what else measured it.
        floor: what the metric is between things that count as equal; None where it has none.
        meaning: what was measured against what, in a few words.
        against: pictures on the other side of a distance, where there is one.
    """

    name: str
    value: float
    interval: tuple[float, float]
    count: int
    extractor: str
    floor: float | None = None
    meaning: str = ""
    against: int | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it, by name."""
        return {
            "value": self.value,
            "interval": list(self.interval),
            "count": self.count,
            "against": self.against,
            "extractor": self.extractor,
            "floor": self.floor,
            "meaning": self.meaning,
        }


@dataclass(frozen=True)
class Evaluation:
    """What one LoRA is worth.

    Args:
        path: of its file.
        original: of the LoRA that it was made from, if that is known.
        bytes: of its file.
        bytes_original: of the original's.
        relative_error: ||dW - dW'||_F / ||dW||_F against the original, exact.
        estimates: everything that was measured on pictures.
        by_timestep: (timestep, relative output error), falling.
        notes: what the user should be told.
        settings: what it was drawn and measured with.
        pictures: some of them by what drew them: base, full, compressed; uint8 (n, 3, H, W).
    """

    path: str
    original: str | None
    bytes: int
    bytes_original: int | None = None
    relative_error: float | None = None
    estimates: tuple[Estimate, ...] = ()
    by_timestep: tuple[tuple[float, float], ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def metrics(self) -> dict[str, float]:
        """Plain numbers by name: size_mb, relative_error, fid and so on, for trackers and for the controller."""
        found = {"size_mb": self.bytes / 1e6}
        if self.bytes_original is not None:
            found["size_mb_full"] = self.bytes_original / 1e6
        if self.relative_error is not None and math.isfinite(self.relative_error):
            found["relative_error"] = self.relative_error
        return found | {estimate.name: estimate.value for estimate in self.estimates}

    def __getitem__(self, name: str) -> float:
        """evaluation["fid"] is evaluation.metrics["fid"]."""
        return self.metrics[name]

    def as_json(self) -> dict[str, Any]:
        """The numbers of `evaluate --json`."""
        return {
            "model": self.path,
            "original": self.original,
            "bytes": self.bytes,
            "bytes_original": self.bytes_original,
            "relative_error": self.relative_error,
            "metrics": self.metrics,
            "estimates": {estimate.name: estimate.as_json() for estimate in self.estimates},
            "relative_output_error_by_timestep": [list(point) for point in self.by_timestep],
            "notes": list(self.notes),
            "settings": self.settings,
        }
