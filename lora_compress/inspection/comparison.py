"""How far apart two LoRA files are, module by module, exactly even where they are nearly equal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..files.regular import size_of
from ..layouts.peft_folder import template_of, weights_of
from ..layouts.sketch import MOST_COMPONENTS
from ..names.matching import fused_layers, match_layers
from ..parallel import each_module
from ..sources import LoraSource
from ..sources.open import open_lora
from ..update import LowRankUpdate, relative_error

__all__ = ["FileComparison", "ModuleComparison", "compare_files", "compare_updates", "difference_norm", "match_names"]

_PREFIX = re.compile(
    r"^(?:base_model[._]model[._])?(?:(?P<te>lora_te(?P<te_number>\d*)|text_encoders?[._]?(?P<encoder>\d*)(?:[._]transformer)?|te(?P<short>\d*))"
    r"|lora_unet|lora_transformer|unet|transformer|diffusion_model|model[._]diffusion_model)[._]"
)


@dataclass(frozen=True)
class ModuleComparison:
    """One module in both files; pairs are (first, second).

    Args:
        name: in the first file, or in the second if only that has it.
        part: U-Net, text encoder, ...
        rank: 0 where a file does not have the module.
        bytes: of its factors.
        squared_error: ||dW - dW'||_F^2.
        squared_norm: ||dW||_F^2 of the first.
    """

    name: str
    part: str
    rank: tuple[int, int]
    bytes: tuple[int, int]
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """||dW - dW'||_F / ||dW||_F; infinite where only the second file has the module."""
        return relative_error(self.squared_error, self.squared_norm)


@dataclass(frozen=True)
class FileComparison:
    """Two files; pairs are (first, second).

    Args:
        paths: of the files.
        bytes: of the files.
        modules: those of the first file, then those that only the second has.
        missing: modules that the other file lacks; they count as zero there.
        others: tensors outside of updates (norms, dora_scale, ...) that only one file has, or that differ.
        notes: what the user must be told of the files.
    """

    paths: tuple[str, str]
    bytes: tuple[int, int]
    modules: tuple[ModuleComparison, ...]
    missing: tuple[tuple[str, ...], tuple[str, ...]]
    others: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        """||dW - dW'||_F / ||dW||_F over all modules."""
        return relative_error(sum(m.squared_error for m in self.modules), sum(m.squared_norm for m in self.modules))

    def as_json(self) -> dict[str, Any]:
        """The numbers of `compare --json`."""
        return {
            "model": self.paths[0],
            "other": self.paths[1],
            "bytes_model": self.bytes[0],
            "bytes_other": self.bytes[1],
            "relative_error": self.relative_error,
            "missing_in_other": list(self.missing[1]),
            "missing_in_model": list(self.missing[0]),
            "other_tensors_that_differ": list(self.others),
            "modules": [
                {"name": m.name, "part": m.part, "rank": m.rank, "bytes": m.bytes, "relative_error": m.relative_error}
                for m in self.modules
            ],
            "notes": list(self.notes),
        }


def compare_files(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    peft_config: str | os.PathLike[str] | None = None,
) -> FileComparison:
    """Compare the updates that two files of any layout hold, packed or plain.

    Modules are the same where their names are, or where they are up to the layout's way of writing them (see `match_names`).

    Args:
        first: the reference: a file, or a folder that PEFT wrote.
        second: what is compared with it.
        alpha: of modules whose alpha neither their file nor a configuration tells, in both files, as `open_lora` takes it.
        peft_config: of the file that is PEFT's and has none beside it; of both where both are such.

    Raises:
        FormatError: no module is in both files, or one has other dimensions in the second.
    """
    configs = [None if template_of(weights_of(path)) else peft_config for path in (first, second)]
    with (
        closing(open_lora(first, alpha=alpha, peft_config=configs[0])) as one,
        closing(open_lora(second, alpha=alpha, peft_config=configs[1])) as two,
    ):
        modules, missing = compare_updates(one, two)
        sizes = size_of(one.path), size_of(two.path)
        paths = os.fspath(first), os.fspath(second)
        notes = tuple(f"{path}: {note}" for path, source in zip(paths, (one, two), strict=True) for note in source.notes)
        notes += _fused_notes(paths, missing)
        return FileComparison(paths, sizes, modules, missing, _differing(one.others, two.others), notes)


def _fused_notes(paths: tuple[str, str], missing: tuple[tuple[str, ...], tuple[str, ...]]) -> tuple[str, ...]:
    """What to know of layers that one file has whole and the other in parts."""
    if not all(missing):
        return ()
    counts = {path: len(fused_layers(list(names))) for path, names in zip(reversed(paths), missing, strict=True)}
    told = "such as img_attn_qkv, have no single partner in the other file, and count as missing there"
    return tuple(f"{path}: modules of fused layers ({count}), {told}" for path, count in counts.items() if count)


def compare_updates(
    first: LoraSource, second: LoraSource
) -> tuple[tuple[ModuleComparison, ...], tuple[tuple[str, ...], tuple[str, ...]]]:
    """A comparison of each module, and the names of those that the first and the second lack."""
    pairs = match_names(first, second)
    taken = set(pairs.values())
    mine = {name: shape for name, shape in first.shapes.items() if name not in pairs}
    pairs |= match_layers(mine, {name: shape for name, shape in second.shapes.items() if name not in taken})
    if first and second and not pairs:
        raise FormatError(
            f"the files have no module in common: {next(iter(first))} in the first, {next(iter(second))} in the second: "
            "compare LoRA of the same model"
        )
    taken = set(pairs.values())
    only_second = tuple(name for name in second if name not in taken)
    jobs = {name: (name, pairs.get(name)) for name in first} | {name: (None, name) for name in only_second}

    def compare(name: str, job: tuple[str | None, str | None]) -> ModuleComparison:
        mine, theirs = (first[job[0]] if job[0] else None), (second[job[1]] if job[1] else None)
        try:
            error, norm = difference_norm(mine, theirs) ** 2, difference_norm(mine, None) ** 2 + (mine.rest if mine else 0.0)
            error += _rest(mine, theirs)
        except FormatError as problem:
            raise FormatError(f"{name}: {problem}") from None
        sizes = first.factor_bytes(job[0]) if job[0] else 0, second.factor_bytes(job[1]) if job[1] else 0
        part = first.part(name) if job[0] else second.part(name)
        return ModuleComparison(name, part, (mine.rank if mine else 0, theirs.rank if theirs else 0), sizes, error, norm)

    missing = only_second, tuple(name for name in first if name not in pairs)
    return tuple(each_module(compare, jobs).values()), missing


def difference_norm(first: LowRankUpdate | None, second: LowRankUpdate | None) -> float:
    """||dW - dW'||_F, with an error of about 1e-15 of ||dW||: None stands for zero.

    dW - dW' = U V with U = [s up, -s' up'] (out, r + r') and V = [down; down'] (r + r', in). With U = Q R and V^T = P S the norm is
    that of the small R S^T. A norm from Gram matrices would be a difference of squares: it has no digit left where the two are
    closer than 1e-8.

    Raises:
        FormatError: the dimensions of the two differ.
    """
    updates = [update for update in (first, second) if update is not None and update.rank]
    if not updates:
        return 0.0
    if first is not None and second is not None:
        if (shapes := [(u.up_matrix.shape[0], u.down_matrix.shape[1]) for u in (first, second)])[0] != shapes[1]:
            raise FormatError(f"is {shapes[0][0]} x {shapes[0][1]} in one file and {shapes[1][0]} x {shapes[1][1]} in the other")
        if first.alpha == second.alpha and torch.equal(first.up, second.up) and torch.equal(first.down, second.down):
            return 0.0
    ups = [update.up_matrix.double() * (update.scale if update is first else -update.scale) for update in updates]
    downs = [update.down_matrix.double() for update in updates]
    return float(torch.linalg.matrix_norm(_triangle(torch.cat(ups, dim=1)) @ _triangle(torch.cat(downs).T).T))


def _rest(first: LowRankUpdate | None, second: LowRankUpdate | None) -> float:
    """What the squared difference of two updates has beyond that of their factors, where one was not read as a whole.

    Raises:
        FormatError: both were not, and differ.
    """
    rests = [update.rest for update in (first, second) if update is not None and update.rest]
    if len(rests) < 2 or first is None or second is None:
        return sum(rests)
    if rests[0] == rests[1] and torch.equal(first.up, second.up) and torch.equal(first.down, second.down):
        return 0.0  # read from the same difference
    raise FormatError(
        f"is in both files a full difference so large that only its {MOST_COMPONENTS} strongest components are read, which does "
        "not tell how far the two are apart: compare one of them with a LoRA that was made of it"
    )


def match_names(first: Iterable[str], second: Iterable[str]) -> dict[str, str]:
    """{name in the first file: name in the second} for modules that both have.

    A name that both have is one module. Others are compared without their prefix (lora_unet_, transformer., text_encoder_2., ...)
    and with dots as underscores, if that tells the modules of each file apart.
    """
    ours, theirs = list(first), list(second)
    pairs = {name: name for name in set(ours) & set(theirs)}
    by_plain_name = _by_plain_name(name for name in theirs if name not in pairs)
    for plain, name in _by_plain_name(name for name in ours if name not in pairs).items():
        if plain in by_plain_name:
            pairs[name] = by_plain_name[plain]
    return {name: pairs[name] for name in ours if name in pairs}


def _by_plain_name(names: Iterable[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_plain_name(name), []).append(name)
    return {plain: same[0] for plain, same in found.items() if len(same) == 1}


def _plain_name(name: str) -> str:
    """`lora_te2_text_model_x` and `text_encoder_2.text_model.x` are both `te2:text_model_x`."""
    match = _PREFIX.match(name)
    rest = name[match.end() :] if match else name
    kind = ""
    if match and match["te"]:
        number = match["te_number"] or match["encoder"] or match["short"] or "1"
        kind = f"te{number}:"
    return kind + rest.replace(".", "_")


def _triangle(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix, mode="r").R


def _differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(
        sorted(
            key for key in {*first, *second} if key not in first or key not in second or not torch.equal(first[key], second[key])
        )
    )
