"""What a layout finds in a file: modules, what was wrong with them, and what the user should know."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..errors import FormatError, SettingsError
from ..files.dtypes import TensorSpec
from ..files.metadata import alpha_in_header
from ..files.tensors import TensorFile
from ..update import LowRankUpdate, ModuleShape
from .peft_config import PeftConfig, applies_to
from .plain import KOHYA_KEYS, PlainKeys
from .quantized import UnknownScale

__all__ = ["LARGEST_CONVERSION", "LARGEST_RANK", "Layout", "Module", "Stated", "Survey"]

LARGEST_CONVERSION = 2**28  # elements of one matrix; the widest layers of FLUX.1 and Qwen-Image have a quarter of it
LARGEST_RANK = 8192  # of a decomposition: minutes; FLUX.2 needs 6144
_FACTOR_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_UNKNOWN_SCALE = (
    "the strength of the file is not known: PEFT keeps alpha in adapter_config.json, which is not beside the file. It was read as "
    "alpha = rank, as most programs read it; state it with --alpha NUMBER or --peft_config FILE"
)
_HEADER_ALPHA = (
    "the strength of the file is not known: its header says alpha {0:g}, which some programs apply and most do not. It was read as "
    "alpha = rank, as most programs read it; state it with --alpha {0:g} if it was trained so"
)


@dataclass(frozen=True)
class Module:
    """One module of a file.

    Args:
        name: the module's prefix in the file.
        layout: name of the layout it is stored in.
        shape: from the header.
        keys: of the tensors that make the update, alpha among them; the first says where in the file the module stands.
        load: reads them.
        plain: its keys in a plain file; what was converted gets kohya's.
        balanced: `load` gives the singular value decomposition: rows sqrt(sigma_i) v_i, columns sqrt(sigma_i) u_i, falling.
        bias_gain: what a bias of the up factor has to be multiplied by when the scale moves into the factors.
    """

    name: str
    layout: str
    shape: ModuleShape
    keys: tuple[str, ...]
    load: Callable[[], LowRankUpdate]
    plain: PlainKeys = KOHYA_KEYS
    balanced: bool = False
    bias_gain: float = 1.0

    def prefixes(self) -> tuple[str, ...]:
        """What the keys of everything that belongs to the module begin with, each followed by a dot."""
        return self.name, self.keys[0].removesuffix(".weight").rpartition(".")[0] or self.name


@dataclass(frozen=True)
class Stated:
    """What the user states of a file that does not tell its scale.

    Args:
        alpha: of every module without one.
        peft_config: path of an adapter_config.json, or of a folder with one.
    """

    alpha: float | None = None
    peft_config: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Raises: SettingsError: alpha is no number that scales anything."""
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha != 0.0):
            raise SettingsError([f"alpha={self.alpha}: must be a finite number other than 0"])


class Survey:
    """A file under examination. Layouts look for free keys in it, add modules and refuse what is broken."""

    def __init__(
        self,
        file: TensorFile,
        repair: bool,
        unknown_scales: Mapping[str, UnknownScale] | None = None,
        stated: Stated = Stated(),
    ) -> None:
        self.file = file
        self.repair = repair
        self.stated = stated
        self._unknown_scales = unknown_scales or {}
        self.modules: dict[str, Module] = {}
        self.problems: list[str] = []
        self.repairs: list[str] = []
        self._free = dict(file)
        self._told: dict[str, list[str]] = {}

    def names(self, suffix: str) -> Iterator[str]:
        """Prefixes of the free keys that end in `suffix`."""
        for key in [key for key in self._free if key.endswith(suffix) and len(key) > len(suffix)]:
            if key in self._free:  # still
                yield key[: -len(suffix)]

    def find(self, key: str) -> TensorSpec | None:
        """The tensor under a free key."""
        return self._free.get(key)

    def claim(self, keys: Iterable[str]) -> None:
        """Take keys: no other layout sees them, and they are not among the others."""
        for key in keys:
            self._free.pop(key, None)

    def drop(self, name: str, keys: Iterable[str]) -> None:
        """Leave a module out: take its keys and those that mean nothing without it."""
        self.claim([*keys, *(name + ending for ending in (".alpha", ".scale", ".dora_scale"))])

    def taken(self, *keys: str) -> tuple[str, ...]:
        """Those of the keys that are in the file and were taken."""
        return tuple(key for key in keys if key in self.file and key not in self._free)

    def free(self) -> list[str]:
        """Keys that no module has taken."""
        return list(self._free)

    def add(self, module: Module) -> None:
        """Take a module and its keys."""
        self.claim(module.keys)
        if module.name in self.modules:
            first = self.modules[module.name].keys[0]
            self.refuse(module.keys[0], f"a second update of the module of {first}", "one for each", "the second is left out")
        else:
            self.modules[module.name] = module

    def rename(self, old: str, new: str, plain: PlainKeys) -> None:
        """Give a module another name than that of its keys, which it keeps in a plain file."""
        self.modules[new] = replace(self.modules.pop(old), name=new, plain=plain)

    def refuse(self, key: str, found: str, allowed: str, fix: str) -> None:
        """Something is wrong with a key: a repair where repairs were asked for, otherwise the file will be refused."""
        if self.repair:
            self.repairs.append(f"{key}: {found}: {fix}")
        else:
            self.problems.append(f"{key}: {found}, allowed: {allowed}; with --force_resize {fix}")

    def usable(self, name: str, *keys: str) -> bool:
        """Whether these tensors may be the factors of a module; otherwise it is refused and left out."""
        for key in keys:
            scale = self._unknown_scales.get(key)
            if scale:
                allowed = "factors that are not quantized, or int8 and fp8 with a scale for all or for each row"
                self.refuse(scale.key, scale.found, allowed, "the module is left out")
            elif problem := _factor_problem(self.find(key)):
                self.refuse(key, problem, "a floating-point matrix, or int8 with its scale beside it", "the module is left out")
            else:
                continue
            self.drop(name, keys)
            self.claim(other for key in keys if key in self._unknown_scales for other in self._unknown_scales[key].beside)
            return False
        return True

    def tell(self, text: str, name: str) -> None:
        """A note on a module; the same note on many becomes one line."""
        self._told.setdefault(text, []).append(name)

    def notes(self) -> list[str]:
        """What a user must be told, repairs first."""
        return self.repairs + [f"{text} ({_how_many(names)})" for text, names in self._told.items()]

    def number(self, key: str) -> float | None:
        """The single finite number under a key such as alpha, None where it is absent or was repaired away."""
        info = self.find(key)
        if info is None:
            return None
        self.claim([key])
        if info.dtype.is_complex or info.numel == 0:
            value = math.nan
        else:
            values = self.file.read(key) if info.numel <= 2**16 else torch.full((2,), math.nan)
            if values.numel() > 1:
                values = values.flatten().to(torch.float64)
                same = bool((values == values[0]).all())
                fix = f"read as {float(values[0]):g}" if same else "read as missing"
                self.refuse(key, f"has the shape {info.shape}", "a single number", fix)
                return float(values[0]) if same and math.isfinite(float(values[0])) else None
            value = float(values)
        if not math.isfinite(value):
            self.refuse(key, f"{value} in the shape {info.shape}", "a finite number", "read as missing")
            return None
        return value

    def alpha(self, *keys: str) -> float | None:
        """alpha under the first key that is there; None where it is absent or zero, which both mean a scale of 1."""
        for key in keys:
            if key in self.file:
                value = self.number(key)
                if value == 0.0:
                    self.tell("alpha is 0, read as alpha = rank, as sd-scripts does; some programs would apply nothing", key)
                return value or None
        return None

    def scale(self, name: str) -> float | None:
        """The rarely used `.scale` of a module, which replaces alpha / rank in AUTOMATIC1111 and stable-diffusion.cpp."""
        value = self.number(name + ".scale") if _is_number(self.find(name + ".scale")) else None
        if value is not None:
            self.tell("a scale of its own replaces alpha / rank and is now part of the factors", name)
        return value

    @cached_property
    def config(self) -> PeftConfig:
        """The configuration of PEFT that goes with the file."""
        return PeftConfig.of(self.file, None if self._is_ours() else self.stated.peft_config)

    def configured_scale(self, name: str, rank: int) -> float | None:
        """What the configuration of the adapter multiplies the factors of a module by; None where it says nothing."""
        scale, told = self.config.scale(name, rank), self.config.rank(name)
        if scale is not None and told not in (None, rank):
            key = next(key for key in self.file if key.startswith(f"{name}."))
            found = f"has rank {rank}, and {self.config.source} says {told}: that configuration is of another file"
            allowed = "the rank of the configuration, whose alpha is of no use otherwise (--peft_config FILE names the right one)"
            self.refuse(key, found, allowed, "its alpha is divided by the rank in the file")
        if scale not in (None, 1.0):
            self.tell("alpha is taken from the configuration of the adapter and is now part of the factors", name)
        return scale

    def stated_scale(self, name: str, rank: int) -> float | None:
        """What the user says that the factors of a module are multiplied by, where the file does not say it."""
        if self._is_ours():
            return None
        if self.stated.alpha is not None:
            self.tell(f"alpha is {self.stated.alpha:g}, as stated with --alpha, and is now part of the factors", name)
            return self.stated.alpha / rank
        told = alpha_in_header(self.file.metadata, name)
        if told is not None and told != rank:
            self.tell(_HEADER_ALPHA.format(told), name)
        elif name.startswith("base_model.model.") or applies_to(self.file.path):  # PEFT wrote it, and keeps alpha elsewhere
            self.tell(_UNKNOWN_SCALE, name)
        return None

    def _is_ours(self) -> bool:
        """Whether this program wrote the file, with the scales in its factors."""
        return any(key.startswith("ss_compress_") for key in self.file.metadata)

    def finish(self) -> None:
        """Raises: FormatError: something was refused; the first problem, and how many there are."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more like it)" if len(self.problems) > 1 else ""
            raise FormatError(f"{self.file.path}: {self.problems[0]}{more}")


@dataclass(frozen=True)
class Layout:
    """A way of storing updates: its name, and the function that finds its modules by their keys."""

    name: str
    find: Callable[[Survey], None]


def _factor_problem(info: TensorSpec | None) -> str:
    if info is None:
        return "is missing"
    if info.dtype not in _FACTOR_DTYPES:
        return f"is {str(info.dtype).removeprefix('torch.')}"
    if len(info.shape) < 2 or len(info.shape) > 5 or info.numel == 0:
        return f"has the shape {info.shape}"
    return ""


def _is_number(info: TensorSpec | None) -> bool:
    return info is not None and info.numel == 1


def _how_many(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} modules, {names[0]} the first"
