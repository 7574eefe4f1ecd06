"""Compressing updates that are in memory, such as those of a network that was trained, and saving the result."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError
from ..files.dtypes import TensorSpec
from ..files.metadata import finish_metadata
from ..files.writer import atomic_path, safetensors_size, write_safetensors
from ..layouts import as_kohya
from ..layouts.plain import FP8, KOHYA_KEYS, exact_plain, plain_update
from ..names.families import part_of
from ..packed.module import decode_module
from ..programs import table as consumers
from ..pruning import consumer_minimum
from ..report import CompressionReport, PartReport
from ..settings import CompressionSettings, QuantizationSettings
from ..update import LowRankUpdate
from .analysis import Decomposition
from .context import FileContext
from .curve import packed_overhead
from .encode import EncodedModule, Encoder
from .output import OutputFile
from .plan import plan

__all__ = [
    "CompressedLora",
    "compress",
    "estimate_size",
    "kohya_partner",
    "opened_by",
    "partner_metadata",
    "plain_partner",
    "plain_size",
    "save",
]


@dataclass(frozen=True)
class CompressedLora:
    """A compressed LoRA in memory.

    Args:
        updates: what a reader of the main file gets, by module; dropped modules are absent.
        tensors: of the main file.
        metadata: of the main file.
        report: sizes and errors; its second size is that of the main file.
        settings: what it was made with.
        exact: whether a plain file beside it is to hold the same factors and alphas, as a training computed with them.
        carried: what both files hold beside the updates, as it is (dora_scale, norms); among `tensors` too.
    """

    updates: dict[str, LowRankUpdate]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    report: CompressionReport
    settings: CompressionSettings
    exact: bool = False
    carried: Mapping[str, Tensor] = field(default_factory=dict)

    def carrying(self, tensors: Mapping[str, Tensor]) -> CompressedLora:
        """Return a copy with more tensors in its files."""
        whole = self.tensors | dict(tensors)
        before, after = self.report.bytes
        grown = safetensors_size({key: TensorSpec.of(tensor) for key, tensor in whole.items()}, self.metadata) - after
        report = replace(self.report, bytes=(before + grown, after + grown))
        return replace(self, tensors=whole, report=report, carried=dict(tensors))


def compress(
    updates: Mapping[str, LowRankUpdate],
    settings: CompressionSettings,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    decompose: Callable[[Mapping[str, LowRankUpdate]], dict[str, Decomposition]] | None = None,
    details: Mapping[str, Any] | None = None,
) -> CompressedLora:
    """Prune and quantize updates that are in memory.

    Args:
        updates: by module name.
        settings: what to remove and how to store the rest.
        dtype: of plain factors (save_precision); None keeps float32. Packed files do not use it.
        metadata: of the trainer, for the file.
        decompose: takes updates of one shape apart; by default by their singular value decompositions.
        details: more entries for the metadata, as ss_compress_* keys.

    Example:
        >>> import torch
        >>> update = LowRankUpdate(torch.randn(8, 64), torch.randn(64, 8), alpha=8.0)
        >>> lora = compress({"lora_unet_mid_block_attentions_0_proj_in": update}, CompressionSettings.parse({"new_rank": 4}))
        >>> lora.updates["lora_unet_mid_block_attentions_0_proj_in"].rank
        4

    Raises:
        FormatError: an update holds NaN or infinity.
        SettingsError: pruning leaves nothing, or the budget cannot be met.
    """
    factors = FP8 if settings.save_format == "fp8" else dtype or torch.float32
    encoder = Encoder(updates, settings, factors) if decompose is None else Encoder(updates, settings, factors, decompose)
    output_file = OutputFile(
        settings, encoder.components, lambda: encoder.dtype, metadata=lambda ranks: metadata or {}, more=details or {}
    )
    protected = consumer_minimum({name: analysis.norm for name, analysis in encoder.components.items()})
    chosen = plan(encoder, FileContext(output_file.size, {name: part_of(name, "") for name in updates}, protected=protected))
    stored = dict(encoder.run(chosen.choices)) if chosen.stored is None else chosen.stored
    if updates and not stored:
        raise SettingsError(["nothing is left of the LoRA: choose a smaller threshold or a larger budget"])
    results = {name: _result(module) for name, module in stored.items()}
    modules = {name: _module_report(encoder, name, stored.get(name)) for name in updates}
    before = plain_size({name: (update, update.rank) for name, update in updates.items()}, dtype)
    report = CompressionReport.of_modules(modules, (before, output_file.size(stored)))
    return CompressedLora(results, output_file.tensors(stored), output_file.finished_metadata(stored), report, settings)


def save(lora: CompressedLora, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> CompressionReport:
    """Write the main file to `path`, and its kohya partner beside it when save_format is both: whole or not at all.

    Args:
        lora: from `compress`.
        path: ends with .safetensors.
        dtype: of the partner's factors; None for float32.

    Raises:
        SaveError: the folder cannot be written or the disk is full.
        SettingsError: the name does not end with .safetensors.
    """
    if Path(path).suffix != ".safetensors":
        raise SettingsError([f"{path}: a compressed LoRA is a safetensors file: end its name with .safetensors"], "output")
    with atomic_path(path) as temporary:  # takes its name only when the partner has: both, or neither
        write_safetensors(lora.tensors, temporary, lora.metadata)
        if lora.settings.save_format == "both":
            make = exact_plain if lora.exact else plain_partner
            partner = {name: make(update, dtype or torch.float32) for name, update in lora.updates.items()}
            with atomic_path(kohya_partner(path)) as beside:
                write_safetensors(as_kohya(partner) | dict(lora.carried), beside, partner_metadata(lora.metadata, partner))
    return lora.report


def plain_partner(update: LowRankUpdate, dtype: torch.dtype, has_alpha: bool = True) -> LowRankUpdate:
    """Return the factors that a packed module has in a plain file."""
    down, up = update.down_matrix, update.up_matrix.T
    if update.scale != 1.0:  # trained quantized: alpha / r of the training is stored beside the codes
        down, up = down * abs(update.scale) ** 0.5, up * math.copysign(abs(update.scale) ** 0.5, update.scale)
    return plain_update(down, up, update.kernel, dtype, 1.0 if has_alpha else None)


def partner_metadata(metadata: Mapping[str, str], partner: Mapping[str, LowRankUpdate]) -> dict[str, str]:
    """Return the metadata of a packed file, changed so that they are true of the plain file beside it."""
    told = {key.removeprefix("ss_compress_"): value for key, value in metadata.items() if key.startswith("ss_compress_")}
    ranks, alphas = [update.rank for update in partner.values()], [update.alpha for update in partner.values()]
    return finish_metadata(metadata, ranks, alphas, {**told, "save_format": "kohya"})


def opened_by(path: str | os.PathLike[str], save_format: str, family: str = "unknown") -> str:
    """Say which programs open what was written to `path`, in a line for each file."""
    lines = {str(path): consumers.opened_by("packed" if save_format == "both" else save_format, family)}
    if save_format == "both":
        lines[str(kohya_partner(path))] = consumers.opened_by("kohya", family)
    return "\n".join(f"{name} opens in: {programs}" for name, programs in lines.items())


def kohya_partner(path: str | os.PathLike[str]) -> Path:
    """Return the path of the plain file beside a packed one.

    Example:
        >>> kohya_partner("style.safetensors").name
        'style.kohya.safetensors'
    """
    return Path(path).with_suffix(".kohya.safetensors")


def estimate_size(updates: Mapping[str, LowRankUpdate], settings: CompressionSettings, dtype: torch.dtype | None) -> int:
    """Estimate the bytes of the main file without its metadata, as if rank_ratio took the same share of every module.

    What thresholds, dynamic_method or an error leave cannot be foreseen: where `CompressionSettings.size_is_open` it is an upper
    estimate. A target_size is returned as it is.
    """
    if settings.budget.size is not None:
        return settings.budget.size
    floor, ratio = settings.pruning.rank_floor, settings.pruning.rank_ratio
    ranks = {}
    for name, update in updates.items():
        most = min(update.rank, update.down_matrix.shape[1], update.up.shape[0]) if settings.enabled else update.rank
        cap = settings.pruning.rank_cap(update.kernel)
        ranks[name] = min(most, max(round(ratio * most), floor, 1), most if cap is None else cap)
    if settings.save_format in ("packed", "both"):
        scales = torch.float32 if settings.quantized_training.qat else torch.bfloat16
        return _packed_estimate({name: (update, ranks[name]) for name, update in updates.items()}, settings.quantization, scales)
    return plain_size({name: (u, ranks[name]) for name, u in updates.items()}, FP8 if settings.save_format == "fp8" else dtype)


def _module_report(encoder: Encoder, name: str, stored: EncodedModule | None) -> PartReport:
    analysis = encoder.components[name]
    lost = analysis.norm if stored is None else stored.squared_error
    return PartReport((1, int(stored is not None)), (analysis.shape.rank, stored.rank if stored else 0), lost, analysis.norm)


def _result(stored: EncodedModule) -> LowRankUpdate:
    """Return the update that a reader of the file gets."""
    if stored.plain is not None:
        return stored.plain
    assert stored.entry is not None
    return decode_module(stored.entry, [chunk.read() for chunk in stored.chunks])


def _packed_estimate(
    updates: Mapping[str, tuple[LowRankUpdate, int]], settings: QuantizationSettings, scale_dtype: torch.dtype
) -> int:
    """Estimate the bytes of a packed file of updates at the given ranks; the size of its index is a typical one."""
    payload = 0
    for update, rank in updates.values():
        columns, outputs = update.down_matrix.shape[1], update.up.shape[0]
        payload += settings.method.payload_size(rank, columns, outputs, settings, scale_bytes=scale_dtype.itemsize)
    return payload + packed_overhead(len(updates))


def plain_size(updates: Mapping[str, tuple[LowRankUpdate, int]], dtype: torch.dtype | None) -> int:
    """Return the bytes of a file in kohya's layout of updates at the given ranks, without metadata."""
    specs: dict[str, TensorSpec] = {}
    for name, (update, rank) in updates.items():
        specs |= KOHYA_KEYS.specs(name, (rank, *update.down.shape[1:]), (update.up.shape[0], rank, *update.up.shape[2:]), dtype)
    return safetensors_size(specs, {})
