"""What can be set: one frozen dataclass per feature, read from strings or TOML values, validated once, all problems at a time."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from .errors import SettingsError

__all__ = [
    "BITS_TABLE",
    "SAVE_FORMATS",
    "CompressionSettings",
    "PruningSettings",
    "QuantizationSettings",
    "refuse_setting",
    "setting_names",
    "split_settings",
]

STRATEGIES = ("dynamic", "static", "nf4")
SAVE_FORMATS = ("kohya", "fp8", "packed", "both")
BITS_TABLE = "dynamic: 4, 8; static: 4, 8; nf4: 4; no quantization: 16"
_BITS = {"dynamic": (4, 8), "static": (4, 8), "nf4": (4,)}
_GROUP_SIZES = {"dynamic": (16, 32, 64, 128, 256, 512, 1024), "nf4": (32, 64, 128, 256)}
_DEFAULT_GROUP_SIZE = 64
_DEFAULT_STATIC_SCALE = 0.0625
_NOT_YET = ("iterative_pruning", "max_iterations")


@dataclass(frozen=True)
class PruningSettings:
    """Which components sigma_i u_i v_i^T of the updates are kept; `pruning.select_ranks` has the formulas."""

    rank_ratio: float = field(default=1.0, metadata={"help": "components kept / all components of the file, in (0, 1]"})
    norm_threshold: float = field(default=0.0, metadata={"help": "effective singular value below which a component goes, >= 0"})
    min_rank: int = field(default=4, metadata={"help": "components that every module keeps at least, >= 0"})

    @property
    def enabled(self) -> bool:
        """Whether anything can be removed."""
        return self.rank_ratio < 1.0 or self.norm_threshold > 0.0

    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = []
        if not 0.0 < self.rank_ratio <= 1.0:
            found.append(f"rank_ratio={self.rank_ratio:g}: must lie in (0, 1]")
        if not 0.0 <= self.norm_threshold < math.inf:
            found.append(f"norm_threshold={self.norm_threshold:g}: must be 0 or more")
        if self.min_rank < 0:
            found.append(f"min_rank={self.min_rank}: must be 0 or more")
        return found


@dataclass(frozen=True)
class QuantizationSettings:
    """How the numbers of the kept components are stored. `None` for group_size and scale means the strategy's own default."""

    bits: int = field(default=16, metadata={"help": f"bits per stored weight ({BITS_TABLE})"})
    strategy: str = field(default="dynamic", metadata={"help": "dynamic, static or nf4"})
    group_size: int | None = field(default=None, metadata={"help": "weights that share a scale (dynamic, nf4); default 64"})
    scale: float | None = field(default=None, metadata={"help": "static only: 8-bit step / RMS of the component; default 0.0625"})

    @property
    def enabled(self) -> bool:
        """Whether weights are stored in fewer than 16 bits."""
        return self.bits < 16

    @property
    def codec_name(self) -> str:
        """Name of the codec in `quantization.CODECS` that writes these settings."""
        return "nf4" if self.strategy == "nf4" else f"int{self.bits}"

    @property
    def block_size(self) -> int | None:
        """Weights per scale; None (strategy static) means one scale for each component."""
        return None if self.strategy == "static" else self.group_size or _DEFAULT_GROUP_SIZE

    @property
    def static_scale(self) -> float | None:
        """The scale of strategy static, None for the others."""
        if self.strategy != "static":
            return None
        return _DEFAULT_STATIC_SCALE if self.scale is None else self.scale

    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = []
        if self.strategy not in STRATEGIES:
            return [f"strategy={self.strategy}: must be one of {', '.join(STRATEGIES)}"]
        if self.bits not in _BITS[self.strategy] and not (self.bits == 16 and self.strategy != "nf4"):
            found.append(f"bits={self.bits} with strategy={self.strategy}: allowed are {BITS_TABLE}")
        allowed_groups = _GROUP_SIZES.get(self.strategy, ())
        if self.group_size is not None and not allowed_groups:
            found.append("group_size is not used by strategy=static (one scale per component): remove it")
        elif self.group_size is not None and self.group_size not in allowed_groups:
            found.append(f"group_size={self.group_size}: strategy={self.strategy} allows {', '.join(map(str, allowed_groups))}")
        if self.scale is not None and self.strategy != "static":
            found.append(f"scale is only used by strategy=static, not by {self.strategy}: remove it")
        elif self.scale is not None and not 0.0 < self.scale < math.inf:
            found.append(f"scale={self.scale:g}: must be above 0 (0.0625 to 0.25 is usual)")
        return found


@dataclass(frozen=True)
class CompressionSettings:
    """Everything that decides what is written. Build it with `parse`, which reports all problems at once.

    Raises:
        SettingsError: a value is out of range or two values contradict each other.
    """

    pruning: PruningSettings = field(default_factory=PruningSettings)
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    save_format: str | None = field(default=None, metadata={"help": "kohya, fp8, packed or both; default packed under 16 bits"})
    quantization_device: str = field(default="cpu", metadata={"help": "where the SVD and the quantizers run: cpu, cuda, cuda:1"})

    def __post_init__(self) -> None:
        problems = self.pruning.problems() + self.quantization.problems()
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

    @property
    def enabled(self) -> bool:
        """Whether a saved file differs at all from what the host would have written."""
        return self.pruning.enabled or self.quantization.enabled or self.save_format != "kohya"

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> CompressionSettings:
        """Build settings from flat `{name: text or number}` pairs such as `{"bits": "4", "rank_ratio": 0.5}`.

        Raises:
            SettingsError: unknown names, values of the wrong type or range, contradictions; all of them in one error.
        """
        known = setting_names()
        problems = [refuse_setting(name, known) for name in values if name not in known]
        parsed: dict[str, Any] = {}
        for name, value in values.items():
            if name in known:
                try:
                    parsed[name] = _convert(value, known[name])
                except (TypeError, ValueError, OverflowError):
                    problems.append(f"{name}={value!r}: must be {_TYPE_NAMES[known[name]]}")
        try:
            pruning = PruningSettings(**_pick(parsed, PruningSettings))
            quantization = QuantizationSettings(**_pick(parsed, QuantizationSettings))
            settings = cls(pruning, quantization, **_pick(parsed, cls))
        except SettingsError as error:  # a default that stands in for what did not parse is not the user's mistake
            stand_ins = tuple(f"{name}=" for name in values if name not in parsed)
            raise SettingsError(problems + [problem for problem in error.problems if not problem.startswith(stand_ins)]) from None
        if problems:
            raise SettingsError(problems)
        return settings

    def as_dict(self) -> dict[str, Any]:
        """The settings as flat `{name: value}` pairs, in the order of their definition, defaults filled in."""
        flat = {f.name: getattr(part, f.name) for part in (self.pruning, self.quantization) for f in fields(part)}
        flat["group_size"] = self.quantization.block_size if self.quantization.enabled else None
        flat["scale"] = self.quantization.static_scale if self.quantization.enabled else None
        return flat | {"save_format": self.save_format, "quantization_device": self.quantization_device}


_TYPES = {"rank_ratio": float, "norm_threshold": float, "min_rank": int, "bits": int, "group_size": int, "scale": float}
_TYPE_NAMES = {float: "a number", int: "a whole number", str: "text"}


def setting_names() -> dict[str, type]:
    """Every name that `CompressionSettings.parse` takes, with its type."""
    names = [f.name for part in (PruningSettings, QuantizationSettings) for f in fields(part)]
    return {name: _TYPES.get(name, str) for name in [*names, "save_format", "quantization_device"]}


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


def refuse_setting(name: str, known: Iterable[str]) -> str:
    """The sentence that refuses `name`: the closest of the names that are `known`, or all of them."""
    if name in _NOT_YET:
        return f"{name}: pruning during training is not part of this version: remove it"
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f", did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
    return f"{name}: unknown setting{hint}"


def _convert(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or value is None:
        raise ValueError
    if kind is str:
        if not isinstance(value, str):
            raise ValueError
        return value.strip().lower()
    if kind is int and isinstance(value, float):
        raise ValueError
    return kind(value)


def _pick(parsed: Mapping[str, Any], cls: type) -> dict[str, Any]:
    return {f.name: parsed[f.name] for f in fields(cls) if f.name in parsed}
