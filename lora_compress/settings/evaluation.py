"""What a training draws to be measured while it runs, and against what: the section [evaluation]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from .parsing import parse_section

__all__ = ["EXTRACTOR_NAMES", "EvaluationSettings"]

EXTRACTOR_NAMES = ("inception", "clip", "dinov2", "probe")
_LEAST_PICTURES = 4  # an interval needs two groups of two
_STRIDE = 64  # pixels: what every host can draw


@dataclass(frozen=True)
class EvaluationSettings:
    """Validation pictures of a training. No name is an option of a host's, whose parser sees them too.

    Raises:
        SettingsError: a value is out of range.
    """

    extractor: str = field(default="inception", metadata={"help": f"of features: {', '.join(EXTRACTOR_NAMES)}"})
    extractor_weights: Path | None = field(
        default=None, metadata={"help": "its file or folder; without it the one that it is known by, downloaded"}
    )
    reference: Path | None = field(
        default=None, metadata={"help": "folder of held-out pictures; without it those of the host's validation_split"}
    )
    prompts: Path | None = field(
        default=None, metadata={"help": "text file with a prompt a line; without it the captions of the held-out pictures"}
    )
    count: int = field(default=64, metadata={"help": f"pictures that are drawn, {_LEAST_PICTURES} or more"})
    size: int = field(default=512, metadata={"help": f"their width and height in pixels, a multiple of {_STRIDE}"})
    steps: int = field(default=20, metadata={"help": "steps of the sampler, 1 to 1000"})
    guidance: float | None = field(
        default=None, metadata={"help": "classifier-free guidance, 0 or more; without it the host's own default"}
    )
    embedded_guidance: float | None = field(
        default=None, metadata={"help": "guidance that FLUX takes as an input, 0 or more; without it the host's own default"}
    )
    first_seed: int = field(default=0, metadata={"help": "seed of the first picture; those of the others follow it; 0 or more"})

    def __post_init__(self) -> None:
        problems = []
        if self.extractor not in EXTRACTOR_NAMES:
            problems.append(f"extractor={self.extractor}: must be one of {', '.join(EXTRACTOR_NAMES)}")
        if self.count < _LEAST_PICTURES:
            problems.append(f"count={self.count}: must be {_LEAST_PICTURES} or more")
        if self.size < _STRIDE or self.size % _STRIDE:
            problems.append(f"size={self.size}: must be a multiple of {_STRIDE}")
        if not 1 <= self.steps <= 1000:
            problems.append(f"steps={self.steps}: must lie in [1, 1000]")
        for name in ("guidance", "embedded_guidance"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                problems.append(f"{name}={value:g}: must be 0 or more")
        if self.first_seed < 0:
            problems.append(f"first_seed={self.first_seed}: must be 0 or more")
        if problems:
            raise SettingsError(problems, "evaluation settings")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> EvaluationSettings:
        """Build settings from `{name: text or number}` pairs.

        Raises:
            SettingsError: unknown names, values of the wrong type or range; all of them in one error.
        """
        return parse_section(cls, values, "evaluation settings")
