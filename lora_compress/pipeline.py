"""Compress updates, estimate what they will weigh, save them: the road from a network to a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .container import FORMAT_KEY, FORMAT_VERSION, to_packed
from .errors import FormatError, SettingsError
from .files import atomic_path, safetensors_size, write_safetensors
from .layouts import FP8, from_kohya, to_kohya
from .metadata import finish_metadata
from .parallel import each_module
from .pruning import select_ranks
from .records import decode_record, encode_record, record_size
from .report import CompressionReport, PartReport
from .settings import CompressionSettings
from .spectrum import Spectrum, thin_svd
from .update import LowRankUpdate, squared_error

__all__ = ["CompressedLora", "compress", "estimate_size", "kohya_partner", "opened_by", "save"]

_OPENED_BY = {
    "kohya": "every program that loads kohya LoRA (ComfyUI, A1111, Forge, diffusers, InvokeAI, stable-diffusion.cpp, sd-scripts)",
    "fp8": "ComfyUI, A1111, Forge, SD.Next, InvokeAI, stable-diffusion.cpp, sd-scripts; diffusers for SD and SDXL",
    "packed": "LoRA Compress alone: sd-scripts with --network_module networks.lora_compress, or lora_compress.load_lora in Python",
}


@dataclass(frozen=True)
class CompressedLora:
    """A compressed LoRA in memory.

    Args:
        updates: what a reader of the main file gets, by module; dropped modules are absent.
        tensors: of the main file.
        report: sizes and errors; its second size is that of the tensors, metadata apart.
        settings: what it was made with.
    """

    updates: dict[str, LowRankUpdate]
    tensors: dict[str, Tensor]
    report: CompressionReport
    settings: CompressionSettings


def compress(
    updates: Mapping[str, LowRankUpdate], settings: CompressionSettings, dtype: torch.dtype | None = None
) -> CompressedLora:
    """Prune and quantize `updates`: thin SVD of each, ranks over the whole file, then the codec or plain factors.

    Args:
        updates: by module name.
        settings: what to remove and how to store the rest.
        dtype: of plain factors (save_precision); None keeps float32. Packed files do not use it.

    Raises:
        FormatError: an update holds NaN or infinity.
        SettingsError: pruning leaves nothing.
    """
    spectra = each_module(lambda name, update: _spectrum(name, update, settings.quantization_device), updates)
    ranks = select_ranks({name: spectrum.sigma.cpu() for name, spectrum in spectra.items()}, settings.pruning)
    if updates and not any(ranks.values()):
        raise SettingsError([f"norm_threshold={settings.pruning.norm_threshold:g} removes every module: choose a smaller one"])
    kept = {name: rank for name, rank in ranks.items() if rank}
    if settings.quantization.enabled:
        records = each_module(lambda name, rank: encode_record(spectra[name], rank, settings.quantization), kept)
        tensors = to_packed(records)
        results = each_module(lambda name, record: decode_record(record, name), records)
    else:
        tensors = {}
        results = each_module(lambda name, rank: _plain(spectra[name], rank), kept)
    if settings.save_format in ("kohya", "fp8"):
        tensors = to_kohya(results, FP8 if settings.save_format == "fp8" else dtype or torch.float32)
        results = from_kohya(tensors)[0]
    modules = each_module(lambda name, update: _module_report(update, results.get(name), kept.get(name, 0)), updates)
    sizes = (_plain_size({name: (u, u.rank) for name, u in updates.items()}, dtype), safetensors_size(tensors))
    return CompressedLora(results, tensors, CompressionReport.of_modules(modules, sizes), settings)


def save(
    lora: CompressedLora,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> CompressionReport:
    """Write the main file to `path`, and its kohya partner beside it when save_format is both: whole or not at all.

    Returns:
        The report, with the size of the main file as it lies on disk.

    Raises:
        SaveError: the folder cannot be written or the disk is full.
        SettingsError: the name does not end with .safetensors.
    """
    if Path(path).suffix != ".safetensors":
        raise SettingsError([f"{path}: a compressed LoRA is a safetensors file: end its name with .safetensors"], "output")
    settings = lora.settings
    details = {**settings.as_dict(), **lora.report.details(), "quantization_device": None}
    packed = {FORMAT_KEY: FORMAT_VERSION} if settings.save_format in ("packed", "both") else {}
    with atomic_path(path) as temporary:  # takes its name only when the partner has: both, or neither
        write_safetensors(lora.tensors, temporary, finish_metadata(metadata, lora.tensors, lora.updates, details) | packed)
        if settings.save_format == "both":
            partner = to_kohya(lora.updates, dtype or torch.float32)
            truth = finish_metadata(metadata, partner, from_kohya(partner)[0], {**details, "save_format": "kohya"})
            with atomic_path(kohya_partner(path)) as beside:
                write_safetensors(partner, beside, truth)
    return dataclasses.replace(lora.report, bytes=(lora.report.bytes[0], os.path.getsize(path)))


def opened_by(path: str | os.PathLike[str], save_format: str) -> str:
    """Which programs open what `save` wrote to `path`, a line for each file."""
    lines = {str(path): _OPENED_BY["packed" if save_format == "both" else save_format]}
    if save_format == "both":
        lines[str(kohya_partner(path))] = _OPENED_BY["kohya"]
    return "\n".join(f"{name} opens in: {programs}" for name, programs in lines.items())


def kohya_partner(path: str | os.PathLike[str]) -> Path:
    """`<stem>.kohya.safetensors` beside a packed file."""
    return Path(path).with_suffix(".kohya.safetensors")


def estimate_size(updates: Mapping[str, LowRankUpdate], settings: CompressionSettings, dtype: torch.dtype | None) -> int:
    """Bytes to expect of the main file, metadata apart, if rank_ratio took the same share of every module.

    norm_threshold cannot be foreseen, so it is an upper estimate where one is set.
    """
    floor, ratio = settings.pruning.rank_floor, settings.pruning.rank_ratio
    ranks = {}
    for name, update in updates.items():
        most = min(update.rank, update.down_matrix.shape[1], update.up.shape[0]) if settings.enabled else update.rank
        ranks[name] = min(most, max(round(ratio * most), floor, 1))
    if settings.save_format in ("packed", "both"):
        sizes = {
            name: record_size(update.down_matrix.shape[1], update.up.shape[0], ranks[name], settings.quantization)
            for name, update in updates.items()
        }
        return safetensors_size(
            to_packed({name: torch.empty(size, dtype=torch.uint8, device="meta") for name, size in sizes.items()})
        )
    kept = {name: (update, ranks[name]) for name, update in updates.items()}
    return _plain_size(kept, FP8 if settings.save_format == "fp8" else dtype)


def _spectrum(name: str, update: LowRankUpdate, device: str) -> Spectrum:
    try:
        return thin_svd(LowRankUpdate(update.down.to(device), update.up.to(device), update.alpha))
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None


def _plain(spectrum: Spectrum, rank: int) -> LowRankUpdate:
    down, up = spectrum.balanced(rank)
    return LowRankUpdate.from_matrices(down.float(), up.T.float(), float(rank), spectrum.kernel)


def _module_report(update: LowRankUpdate, result: LowRankUpdate | None, rank: int) -> PartReport:
    error, norm = squared_error(update, result)
    return PartReport((1, int(result is not None)), (update.rank, rank), error, norm)


def _plain_size(updates: Mapping[str, tuple[LowRankUpdate, int]], dtype: torch.dtype | None) -> int:
    """Bytes of a kohya file of updates at the given ranks."""
    tensors = {}
    for name, (update, rank) in updates.items():
        shapes = {
            "lora_down.weight": (rank, *update.down.shape[1:]),
            "lora_up.weight": (update.up.shape[0], rank, *update.up.shape[2:]),
        }
        for key, shape in shapes.items():
            tensors[f"{name}.{key}"] = torch.empty(shape, dtype=dtype or torch.float32, device="meta")
        tensors[f"{name}.alpha"] = torch.empty((), dtype=torch.float32, device="meta")
    return safetensors_size(tensors)
