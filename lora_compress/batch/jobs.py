"""From a folder or a pattern to pairs of an input and an output, checked against each other before any work."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ..errors import SettingsError
from ..layouts.peft_folder import CONFIG_NAME, WEIGHTS_NAMES
from ..settings import CompressionSettings
from .storage import exists, files_under, glob_files, has_magic, is_folder, is_remote, join

__all__ = ["CompressOptions", "Job", "is_batch", "plan_jobs"]

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
_TRAINER_STATES = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")  # of transformers' Trainer and accelerate


@dataclass(frozen=True)
class Job:
    """One file of a batch; both paths may be URLs that fsspec opens.

    Args:
        source: the file, of a folder that PEFT wrote its weights.
        target: the file to write.
        adapter: whether an adapter_config.json belongs to the weights and is to be written beside the target.
    """

    source: str
    target: str
    adapter: bool = False


@dataclass(frozen=True)
class CompressOptions:
    """What is done to every file of a batch: the arguments of `pipeline.compress_file`, and what follows from its result.

    Args:
        copy_uncompressible: whether a file whose result would be no smaller is copied as it is.
    """

    settings: CompressionSettings
    save_dtype: torch.dtype | None = None
    consumers: tuple[str, ...] = ()
    base_model: str | None = None
    calibration: str | None = None
    force: bool = False
    repair: bool = False
    copy_uncompressible: bool = False
    alpha: float | None = None
    peft_config: str | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """Arguments of `compress_file` by keyword."""
        names = ("save_dtype", "consumers", "base_model", "calibration", "force", "repair")
        stated = {name: value for name in ("alpha", "peft_config") if (value := getattr(self, name)) is not None}
        return {name: getattr(self, name) for name in names} | stated

    @property
    def writes_partner(self) -> bool:
        """Whether a kohya file is written beside the packed one."""
        return self.settings.save_format == "both"


def is_batch(model: str) -> bool:
    """Whether `model` names many files: a folder, or a pattern with *, ? or [ that is no file itself.

    A folder that PEFT wrote for one adapter is one input, unless others lie in the folders within.
    """
    if is_remote(model) or not os.path.isdir(model):
        return is_folder(model) or (has_magic(model) and not os.path.exists(model))
    inputs = [os.path.normpath(path) for path in files_under(model) if _is_input(path)]
    return inputs != [os.path.normpath(_adapter_weights(model) or "")]


def _adapter_weights(folder: str) -> str | None:
    """The weights that PEFT loads from a folder with an adapter_config.json; None of any other folder."""
    if not exists(join(folder, CONFIG_NAME)):
        return None
    return next((path for name in WEIGHTS_NAMES if exists(path := join(folder, name))), None)


def plan_jobs(model: str, save_to: str, force: bool = False, partner: bool = False, adapters: bool = True) -> list[Job]:
    """A job for every LoRA file in the folder `model` and the folders in it, or for every match of a pattern.

    An output has the place under `save_to` that its input has under the folder, or under the part of the pattern before its first
    wildcard, and ends with .safetensors. Files in `save_to` are no inputs, nor are those whose name begins with a dot.

    Args:
        force: whether outputs may replace inputs.
        partner: whether <name>.kohya.safetensors is written beside each output.
        adapters: whether an adapter_config.json is written beside the weights of what has one: PEFT reads plain files alone.

    Raises:
        SettingsError: nothing matches, two inputs have one output, or an output is an input.
    """
    root = model if is_folder(model) else _fixed_part(model)
    found = files_under(model) if is_folder(model) else _matches(model)
    inside = _inside(save_to, root)
    sources = [path for path in found if _is_input(path) and not (inside and _inside(path, save_to))]
    if not sources:
        raise SettingsError([f"--model {model}: matches no {', '.join(_SUFFIXES)} file: check the folder or the pattern"], "batch")
    jobs = [Job(source, _target(source, root, save_to), adapters and _is_adapter(source)) for source in sources]
    problems = _clashes(jobs, partner) + ([] if force else _overwritten(jobs))
    if problems:
        raise SettingsError(problems, "batch")
    return jobs


def _matches(pattern: str) -> list[str]:
    """The files that match a pattern, and the weights in folders of PEFT that match it."""
    folders = [] if is_remote(pattern) else [path for path in glob.glob(pattern, recursive=True) if os.path.isdir(path)]
    return sorted({*glob_files(pattern), *filter(None, map(_adapter_weights, folders))})


def _fixed_part(pattern: str) -> str:
    """The folders of a pattern before its first wildcard."""
    parts = pattern.replace(os.sep, "/").split("/")
    first = next(index for index, part in enumerate(parts) if has_magic(part))
    return "/".join(parts[:first]) or ("/" if first else ".")


def _target(source: str, root: str, save_to: str) -> str:
    place = os.path.relpath(source, root).replace(os.sep, "/") if not is_remote(source) else source[len(root.rstrip("/")) + 1 :]
    return join(save_to, str(PurePosixPath(place).with_suffix(".safetensors")))


def _is_input(path: str) -> bool:
    """Whether a file is to be compressed: by its name; beside an adapter's weights no state of a trainer, nor a second copy."""
    name = PurePosixPath(path.replace(os.sep, "/")).name
    if name == WEIGHTS_NAMES[1]:
        return _is_adapter(path)
    if name.startswith(_TRAINER_STATES) and _adapter_weights(path[: -len(name) - 1]):
        return False
    return path.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _is_adapter(path: str) -> bool:
    """Whether a file is what PEFT loads from its folder."""
    name = PurePosixPath(path.replace(os.sep, "/")).name
    weights = _adapter_weights(path[: -len(name) - 1]) if name in WEIGHTS_NAMES else None
    return weights is not None and weights.endswith(name)


def _inside(path: str, folder: str) -> bool:
    """Whether `path` lies in `folder`, and is not that folder."""
    if is_remote(path) or is_remote(folder):
        return path.startswith(folder.rstrip("/") + "/")
    own, other = Path(path).resolve(), Path(folder).resolve()
    return own != other and other in own.parents


def _clashes(jobs: Iterable[Job], partner: bool) -> list[str]:
    taken: dict[str, str] = {}
    problems = []
    for job in jobs:
        for target in (job.target, str(job.target).removesuffix(".safetensors") + ".kohya.safetensors")[: 1 + partner]:
            if target in taken:
                problems.append(f"{taken[target]} and {job.source} would both become {target}: rename one of them")
            taken[target] = job.source
    return problems


def _overwritten(jobs: Iterable[Job]) -> list[str]:
    def place(path: str) -> str:
        return path if is_remote(path) else os.path.realpath(path)

    jobs = list(jobs)
    sources = {place(job.source): job.source for job in jobs}
    hit = [sources[place(job.target)] for job in jobs if place(job.target) in sources]
    if not hit:
        return []
    return [f"{len(hit)} inputs would be overwritten, {hit[0]} first: choose another --save_to, or allow it with --force"]
