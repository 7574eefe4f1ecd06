"""Norms of the base model's layers, against which an update is large or small; computed once per checkpoint, then cached."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FormatError, SaveError
from ..files.header import read_header
from ..files.regular import size_of, written_at
from ..files.tensors import open_safetensors
from ..files.writer import atomic_path
from ..names.base_layers import LayerRows, layer_name, layers_of_key
from ..settings.cache_folder import cache_folder

__all__ = ["BaseNorm", "base_norms", "relative_scores", "relative_weights", "spectral_norm"]

_LOGGER = logging.getLogger(__name__)
_CACHE_VERSION = 1
_FOLDERS = {"unet": "unet", "transformer": "unet", "text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3"}
_BLOCK, _DEPTH = 6, 6  # of the Krylov space: 42 vectors, 14 passes over the weight


class BaseNorm(NamedTuple):
    """Of a base layer's weight as a matrix (out, in * kernel).

    Args:
        spectral: largest singular value.
        frobenius: root of the sum of squares.
    """

    spectral: float
    frobenius: float


def base_norms(
    path: str | os.PathLike[str], modules: Iterable[str], cache_dir: str | os.PathLike[str] | None = None
) -> dict[str, BaseNorm]:
    """Norms of the base layers that LoRA modules belong to, read layer by layer. Modules that the checkpoint lacks are left out.

    Args:
        path: a .safetensors checkpoint (LDM, SGM or bare), or a folder in diffusers' layout.
        modules: LoRA module names.
        cache_dir: where norms are kept, by path, size and time of the checkpoint; default `cache_folder()`. A damaged
            cache is built anew; one that cannot be written is told in the log.

    Raises:
        FormatError: the checkpoint cannot be read, or none of the modules belongs to it.
    """
    files = _files(Path(path))
    wanted = {module: layer_name(module) for module in modules}
    cache = Path(cache_dir or cache_folder()) / f"base-norms-{_fingerprint(files)}.json"
    known = _read_cache(cache)
    missing = set(wanted.values()) - known.keys()
    if missing:
        new = dict(_measure(files, missing))
        if new:
            known |= new
            _write_cache(cache, known)
    found = {module: known[name] for module, name in wanted.items() if name in known}
    if wanted and not found:
        raise FormatError(
            f"{path}: holds the layer of none of {len(wanted)} modules, {next(iter(wanted))} for one: give the base model that the "
            "LoRA was trained on"
        )
    return found


def relative_scores(sigmas: Mapping[str, Tensor], norms: Mapping[str, BaseNorm], kind: str = "spectral") -> dict[str, Tensor]:
    """sigma_mi / ||W_m||: what a component is against the layer it changes.

    Modules without a norm (or a base layer of zeros) are scored against the geometric mean of the others' norms.

    Args:
        sigmas: per module, each (k,).
        norms: of `base_norms`.
        kind: "spectral" or "frobenius".
    """
    divisors = _divisors(sigmas, norms, kind)
    return {name: sigma / divisors[name] for name, sigma in sigmas.items()}


def relative_weights(modules: Iterable[str], norms: Mapping[str, BaseNorm], kind: str = "spectral") -> dict[str, float]:
    """w_m = 1 / ||W_m||^2, what squared singular values are multiplied by in `allocation`; see `relative_scores`."""
    return {name: divisor**-2 for name, divisor in _divisors(modules, norms, kind).items()}


def spectral_norm(weight: Tensor) -> float:
    """Largest singular value of a matrix, by Rayleigh-Ritz on a block Krylov space; the same at every call.

    A lower bound; within 1 % for the flat spectra of random matrices, exact to rounding where the largest value stands out
    (Musco and Musco 2015, https://arxiv.org/abs/1504.05477).

    Args:
        weight: (m, n), float32 or float64.
    """
    if weight.shape[0] > weight.shape[1]:
        weight = weight.T
    if weight.shape[0] <= _BLOCK * (_DEPTH + 1):
        return float(torch.linalg.svdvals(weight)[0])
    start = torch.randn(weight.shape[1], _BLOCK, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    blocks = [torch.linalg.qr(weight @ start.to(weight.device)).Q]
    for _ in range(_DEPTH):
        blocks.append(torch.linalg.qr(weight @ (weight.T @ blocks[-1])).Q)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q  # (m, block * (depth + 1))
    return float(torch.linalg.svdvals(basis.T @ weight)[0])


def _divisors(modules: Iterable[str], norms: Mapping[str, BaseNorm], kind: str) -> dict[str, float]:
    known = {name: float(getattr(norm, kind)) for name, norm in norms.items()}
    known = {name: value for name, value in known.items() if value > 0.0}
    mean = math.exp(sum(map(math.log, known.values())) / len(known)) if known else 1.0
    return {name: known.get(name, mean) for name in modules}


def _files(path: Path) -> list[tuple[Path, str | None]]:
    """The files of a checkpoint, each with the component that its folder stands for."""
    if not path.is_dir():
        files: list[tuple[Path, str | None]] = [(path, None)]
    else:
        files = [(file, part) for folder, part in _FOLDERS.items() for file in _one_precision(path / folder)]
        files = files or [(file, None) for file in _one_precision(path)]
    absent = [str(file) for file, _ in files if not file.is_file()]
    if absent or not files:
        raise FormatError(f"{path}: no checkpoint here: give a .safetensors file or a folder in diffusers' layout")
    return files


def _one_precision(folder: Path) -> list[Path]:
    """The weights of a folder, without the variants (model.fp16.safetensors) where the plain ones lie beside them."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if "." not in file.stem]
    return plain or files


def _fingerprint(files: list[tuple[Path, str | None]]) -> str:
    stats = [(str(file.resolve()), size_of(file), written_at(file)) for file, _ in files]
    return hashlib.sha256(json.dumps([_CACHE_VERSION, stats]).encode()).hexdigest()[:24]


def _measure(files: list[tuple[Path, str | None]], wanted: set[str]) -> Iterator[tuple[str, BaseNorm]]:
    for path, component in files:
        found = {
            key: [layer for layer in layers_of_key(key, component) if layer.name in wanted] for key in read_header(path).tensors
        }
        layers = {key: layers for key, layers in found.items() if layers}
        with closing(open_safetensors(path, layers.__contains__)) as file:
            for key, spec in file.items():
                if len(spec.shape) >= 2:
                    weight = file.read(key).flatten(1).float()
                    yield from ((layer.name, _norm(path, key, _rows(weight, layer))) for layer in layers[key])


def _rows(weight: Tensor, layer: LayerRows) -> Tensor:
    return weight.chunk(layer.parts)[layer.part]


def _norm(path: Path, key: str, weight: Tensor) -> BaseNorm:
    frobenius = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    if not math.isfinite(frobenius):
        raise FormatError(f"{path}: {key} holds NaN or infinity: give an undamaged checkpoint")
    return BaseNorm(spectral_norm(weight) if frobenius else 0.0, frobenius)


def _read_cache(path: Path) -> dict[str, BaseNorm]:
    """What the cache holds, nothing if it is absent or damaged."""
    try:
        norms = json.loads(path.read_text(encoding="utf-8"))["norms"]
        read = {str(name): BaseNorm(*map(float, pair)) for name, pair in norms.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return read if all(0.0 <= norm.spectral <= norm.frobenius * 1.001 < math.inf for norm in read.values()) else {}


def _write_cache(path: Path, norms: Mapping[str, BaseNorm]) -> None:
    try:
        with atomic_path(path) as beside:
            beside.write_text(json.dumps({"version": _CACHE_VERSION, "norms": norms}), encoding="utf-8")
    except SaveError as error:
        _LOGGER.warning("norms of the base model are not kept for the next time: %s", error)
