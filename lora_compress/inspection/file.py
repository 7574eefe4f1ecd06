"""What a LoRA file holds, and what smaller ones made from it would lose, told from the spectra alone."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from ..allocation import truncation_points
from ..engine.curve import entropy_points, packed_overhead, with_rest
from ..engine.energy import energy_notes
from ..engine.precision import Factors, budget_precisions
from ..errors import FormatError
from ..files.regular import size_of
from ..parallel import each_module
from ..report.file_report import FileReport, ModuleReport
from ..sources import LoraSource
from ..sources.open import open_lora
from ..spectrum import thin_svd
from .comparison import compare_files

__all__ = ["FileInspection", "ModuleInspection", "effective_rank", "inspect_file", "report_files", "truncation_curve"]

_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class ModuleInspection:
    """One module.

    Args:
        name: in the file.
        part: U-Net, text encoder, ...
        shape: of the layer's weight, (out, in, *kernel).
        rank: of the factors as they are read: of a cut file, the components that are left.
        bytes: that its factors take.
        sigma: effective singular values, falling; alpha / r is part of them.
        rest: squared norm of what they do not hold; see `LowRankUpdate.rest`.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    rank: int
    bytes: int
    sigma: tuple[float, ...]
    rest: float = 0.0

    @property
    def norm(self) -> float:
        """||dW||_F."""
        return math.sqrt(math.fsum((*(value * value for value in self.sigma), self.rest)))

    @property
    def effective_rank(self) -> float:
        """See `effective_rank`."""
        return effective_rank(self.sigma)

    @property
    def component_weights(self) -> int:
        """Weights of one component, out + in * kernel."""
        return self.shape[0] + math.prod(self.shape[1:])


@dataclass(frozen=True)
class FileInspection:
    """One file.

    Args:
        dtype: of its factors as they are read.
        codec: of a packed file, that of most modules; "" of a plain one.
        curve: (bytes, relative error) of smaller plain files cut from it, in `curve_dtype`.
        packed_curve: of smaller entropy-coded files.
        curve_dtype: precision that a plain file of a given size or error is stored in.
    """

    path: str
    layout: str
    family: str
    dtype: str
    codec: str
    bytes: int
    modules: tuple[ModuleInspection, ...]
    notes: tuple[str, ...]
    metadata: Mapping[str, str]
    curve: tuple[tuple[int, float], ...]
    packed_curve: tuple[tuple[int, float], ...]
    curve_dtype: str = "float16"

    @property
    def stored_as(self) -> str:
        """Codec or precision, for people."""
        return f"packed by {self.codec}" if self.codec else self.dtype

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest rank."""
        ranks = [module.rank for module in self.modules] or [0]
        return min(ranks), max(ranks)

    def as_json(self) -> dict[str, Any]:
        """The numbers of `inspect --json`."""
        return {
            "model": self.path,
            "layout": self.layout,
            "family": self.family,
            "dtype": self.dtype,
            "codec": self.codec or None,
            "bytes": self.bytes,
            "ranks": self.ranks,
            "effective_rank": mean_effective_rank(self.modules),
            "modules": [
                {
                    "name": m.name,
                    "part": m.part,
                    "shape": m.shape,
                    "rank": m.rank,
                    "bytes": m.bytes,
                    "norm": m.norm,
                    "effective_rank": m.effective_rank,
                    "sigma": m.sigma,
                }
                for m in self.modules
            ],
            "smaller": _as_json(self.curve),
            "smaller_packed": _as_json(self.packed_curve),
            "notes": list(self.notes),
            "metadata": dict(self.metadata),
        }


def inspect_file(
    path: str | os.PathLike[str], *, alpha: float | None = None, peft_config: str | os.PathLike[str] | None = None
) -> FileInspection:
    """Open a LoRA file of any layout, packed or plain, and take the spectrum of every module.

    Args:
        path: of the file, or of a folder that PEFT wrote.
        alpha, peft_config: as `open_lora` takes them.

    Raises:
        FormatError: it is no LoRA file, or a module holds NaN.
    """
    with closing(open_lora(path, alpha=alpha, peft_config=peft_config)) as source:
        return _inspected(os.fspath(path), source)


def _inspected(path: str, source: LoraSource) -> FileInspection:
    def look(name: str, _: object) -> ModuleInspection:
        update = source[name]
        try:
            sigma = thin_svd(update).sigma
        except FormatError as error:
            raise FormatError(f"{path}: {name}: {error}") from None
        shape = (update.up.shape[0], *update.down.shape[1:])
        sizes = shape, update.rank, source.factor_bytes(name)
        return ModuleInspection(name, source.part(name), *sizes, tuple(sigma.tolist()), update.rest)

    modules = tuple(each_module(look, dict.fromkeys(source)).values())
    size, dtype = size_of(source.path), source.dtype
    overhead = size - sum(module.bytes for module in modules)
    codecs = Counter(source.codec(name) for name in source)
    spectra = [((math.prod(module.shape[1:]), module.shape[0]), module.sigma) for module in modules]
    beside = overhead if source.packed else _beside_payload(source)
    precision = _precision(source, modules)
    curves = truncation_curve(modules, precision.itemsize, overhead), entropy_points(spectra, beside)
    rest, norm = math.fsum(module.rest for module in modules), math.fsum(module.norm**2 for module in modules)
    plain, packed = (tuple(point for point in with_rest(curve, rest, norm) if point[0] < size) for curve in curves)
    return FileInspection(
        path,
        source.layout,
        source.family,
        str(dtype).removeprefix("torch."),
        codecs.most_common(1)[0][0] if codecs else "",
        size,
        modules,
        (*source.notes, *energy_notes({module.name: module.norm**2 for module in modules})),
        source.metadata,
        plain,
        packed,
        str(precision).removeprefix("torch."),
    )


def _precision(source: LoraSource, modules: Sequence[ModuleInspection]) -> torch.dtype:
    """The precision of a plain file that is made from this one for a size or an error."""
    factors = (
        Factors(torch.tensor(module.sigma, dtype=torch.float64), (math.prod(module.shape[1:]), module.shape[0]))
        for module in modules
    )
    return budget_precisions(source.dtype, factors, all(source.plain_keys(name).alpha is not None for name in source))[0]


def _beside_payload(source: LoraSource) -> int:
    """Bytes that a packed file made of a plain one would have beside its payload."""
    return packed_overhead(len(source)) + source.carried_bytes + len(json.dumps(dict(source.metadata)))


def _as_json(curve: Sequence[tuple[int, float]]) -> list[dict[str, float]]:
    return [{"bytes": size, "relative_error": error} for size, error in curve]


def report_files(original: str, path: str) -> FileReport:
    """What became of `original` in `path`, as if it had just been compressed: told from the two files.

    Raises:
        FormatError: one of them cannot be read, or they are of different models.
    """
    inspected, compared = inspect_file(original), compare_files(original, path)
    changed = {module.name: module for module in compared.modules}
    reports = []
    for module in inspected.modules:
        other = changed[module.name]
        numbers = other.rank, other.bytes, other.squared_error, other.squared_norm
        reports.append(ModuleReport(module.name, module.part, module.shape, *numbers, module.sigma))
    bytes_, about = compared.bytes, (inspected.layout, inspected.family)
    return FileReport(original, path, "written", *about, bytes_, 0.0, tuple(reports), inspected.notes, curve=inspected.curve)


def effective_rank(sigma: Sequence[float]) -> float:
    """exp(H(p)) with p_i = sigma_i^2 / sum_j sigma_j^2 and the entropy H(p) = -sum_i p_i ln p_i; 0 for an update that is zero.

    1 for a single component, n for n equal ones: how many components carry the energy. Roy and Vetterli
    (https://ieeexplore.ieee.org/document/7098875) take shares of sigma; shares of sigma^2 are those of the squared error.
    """
    energy = [value * value for value in sigma]
    total = math.fsum(energy)
    if not total > 0.0:
        return 0.0
    return math.exp(-math.fsum(part / total * math.log(part / total) for part in energy if part > 0.0))


def mean_effective_rank(modules: Sequence[ModuleInspection]) -> float:
    """The mean over the modules that are not zero."""
    ranks = [rank for module in modules if (rank := module.effective_rank)]
    return math.fsum(ranks) / len(ranks) if ranks else 0.0


def truncation_curve(
    modules: Sequence[ModuleInspection], bytes_per_weight: int, overhead: int, errors: Sequence[float] = _ERRORS
) -> tuple[tuple[int, float], ...]:
    """(bytes, relative error) of the smallest plain files that lose at most `errors`, every module keeping a component.

    What is lost is known exactly, the size but for a few bytes of header.

    Args:
        bytes_per_weight: of the file's precision.
        overhead: bytes of the file that are no factors.
    """
    kept = [module for module in modules if module.norm > 0.0]
    sigmas = [torch.tensor(module.sigma, dtype=torch.float64) for module in kept]
    costs = [module.component_weights * bytes_per_weight for module in kept]
    points = truncation_points(sigmas, costs, errors, min_rank=1)
    return tuple({overhead + size: error for size, error in points}.items())
