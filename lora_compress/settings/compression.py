"""All settings together: parsed from flat names and values, checked against each other, all problems in one error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..errors import SettingsError
from .budget import BudgetSettings
from .parsing import names_of, parse_values, pick, refuse_setting
from .pruning import PruningSettings
from .quantization import QuantizationSettings
from .training import QatSettings, TrainingSettings

__all__ = ["SAVE_FORMATS", "SECTIONS", "CompressionSettings", "setting_names", "split_settings"]

SAVE_FORMATS = ("kohya", "fp8", "packed", "both")


@dataclass(frozen=True)
class CompressionSettings:
    """Everything that decides what is written. Build it with `parse`, which reports all problems at once.

    Example:
        >>> settings = CompressionSettings.parse({"rank_ratio": 0.5, "bits": "4"})
        >>> settings.pruning.rank_ratio, settings.quantization.bits, settings.save_format
        (0.5, 4, 'packed')

    Raises:
        SettingsError: a value is out of range or two values contradict each other.
    """

    pruning: PruningSettings = field(default_factory=PruningSettings)
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    quantized_training: QatSettings = field(default_factory=QatSettings)
    save_format: str | None = field(default=None, metadata={"help": "kohya, fp8, packed or both; default packed under 16 bits"})
    quantization_device: str = field(
        default="cpu", metadata={"help": "where the SVD and fixed-width quantizers run: cpu, cuda, cuda:1"}
    )

    def __post_init__(self) -> None:
        problems = [problem for part in (*self._parts, self.training, self.quantized_training) for problem in part.problems()]
        problems = problems or self.quantization.budget_problems(self.budget.enabled)
        problems += self._training_problems()
        quantized = self.quantization.enabled
        if self.save_format is None:
            object.__setattr__(self, "save_format", "packed" if quantized else "kohya")
        elif self.save_format not in SAVE_FORMATS:
            problems.append(f"save_format={self.save_format}: must be one of {', '.join(SAVE_FORMATS)}")
        elif self.save_format in ("packed", "both") and not quantized:
            problems.append(f"save_format={self.save_format} stores quantized weights: set bits under 16, or save_format=kohya")
        elif self.save_format == "fp8" and quantized:
            problems.append("save_format=fp8 has 8-bit floats of its own: set bits=16, or save_format=packed")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.quantization_device):
            problems.append(f"quantization_device={self.quantization_device}: must be cpu, cuda or cuda:<number>")
        elif self.quantization_device != "cpu" and not torch.cuda.is_available():
            problems.append(f"quantization_device={self.quantization_device}: torch finds no CUDA device here: use cpu")
        if problems:
            raise SettingsError(problems)

    def _training_problems(self) -> list[str]:
        pruned = self.training.iterative_pruning
        found = self.training.joint_problems(self.pruning)
        return found + self.quantized_training.joint_problems(self.quantization, self.pruning, self.budget.enabled, pruned)

    @property
    def _parts(self) -> tuple[PruningSettings, QuantizationSettings, BudgetSettings]:
        return self.pruning, self.quantization, self.budget

    @property
    def enabled(self) -> bool:
        """Whether a saved file differs at all from what the host would have written."""
        return any(part.enabled for part in self._parts) or self.save_format != "kohya"

    @property
    def acts_in_training(self) -> bool:
        """Whether anything happens before a file is written."""
        return self.training.iterative_pruning or self.training.collect_calibration or self.quantized_training.qat

    @property
    def size_is_open(self) -> bool:
        """Whether the size of the file depends on the weights, and not on the settings alone."""
        pruning, budget = self.pruning, self.budget
        thresholds = pruning.norm_threshold or pruning.layer_threshold or pruning.channel_threshold
        return budget.size is None and (bool(thresholds) or pruning.dynamic_method is not None or budget.enabled)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> CompressionSettings:
        """Build settings from flat `{name: text or number}` pairs such as `{"bits": "4", "rank_ratio": 0.5}`.

        Raises:
            SettingsError: unknown names, values of the wrong type or range, contradictions; all of them in one error.
        """
        parsed, problems = parse_values(values, setting_names())
        try:
            parts: list[Any] = [part(**pick(parsed, part)) for part in _PARTS]
            settings = cls(*parts, **pick(parsed, cls))
        except SettingsError as error:  # a default that stands in for what did not parse is not the user's mistake
            stand_ins = tuple(f"{name}=" for name in values if name not in parsed)
            raise SettingsError(problems + [problem for problem in error.problems if not problem.startswith(stand_ins)]) from None
        if problems:
            raise SettingsError(problems)
        return settings

    def as_dict(self) -> dict[str, Any]:
        """The settings as flat `{name: value}` pairs, in order, with defaults filled in and None for what is off."""
        flat = {f.name: getattr(part, f.name) for part in self._parts for f in fields(part)}
        quantization, pruning = self.quantization, self.pruning
        flat["bits"] = quantization.bits if quantization.averages else quantization.bits or 16
        flat["min_rank"] = pruning.rank_floor
        flat["group_size"] = quantization.block_size if quantization.enabled else None
        flat["scale"] = quantization.static_scale if quantization.enabled else None
        for name in ("progressive", "refine"):
            if name not in quantization.method.defaults:
                flat[name] = None
        for name in ("layer_threshold", "channel_threshold", "allow_larger"):
            flat[name] = flat[name] or None
        flat |= {
            f.name: getattr(self.training, f.name) if self.training.iterative_pruning else None for f in fields(TrainingSettings)
        }
        flat["collect_calibration"] = self.training.collect_calibration or None
        flat |= {
            f.name: getattr(self.quantized_training, f.name) if self.quantized_training.qat else None for f in fields(QatSettings)
        }
        return flat | {"save_format": self.save_format, "quantization_device": self.quantization_device}


_PARTS = (PruningSettings, QuantizationSettings, BudgetSettings, TrainingSettings, QatSettings)
# The sections of a configuration file, which are flags of the training script too, and the settings that each takes.
SECTIONS: dict[str, tuple[str, ...]] = {
    "pruning": tuple(name for part in (PruningSettings, BudgetSettings, TrainingSettings) for name in names_of(part)),
    "quantization": (
        *(name for part in (QuantizationSettings, QatSettings) for name in names_of(part)),
        "save_format",
        "quantization_device",
    ),
}


def setting_names() -> dict[str, type]:
    """Every name that `CompressionSettings.parse` takes, with its type."""
    names = {name: kind for part in _PARTS for name, kind in names_of(part).items()}
    return names | {"save_format": str, "quantization_device": str}


def split_settings(values: Mapping[str, Any], host_names: Iterable[str]) -> tuple[CompressionSettings, dict[str, Any]]:
    """Part `values` into our settings and the host's own arguments (`host_names`).

    Raises:
        SettingsError: a name belongs to neither, or our values do not parse.
    """
    host = set(host_names)
    ours = {name: value for name, value in values.items() if name not in host}
    known = {*setting_names(), *host}
    strangers = [name for name in ours if name not in setting_names()]
    problems = [refuse_setting(name, known) for name in strangers]
    try:
        settings = CompressionSettings.parse({name: value for name, value in ours.items() if name not in strangers})
    except SettingsError as error:
        raise SettingsError([*problems, *error.problems]) from None
    if problems:
        raise SettingsError(problems)
    return settings, {name: value for name, value in values.items() if name in host}
