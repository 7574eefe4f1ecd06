"""The report of a compressed file: each module in numbers, and notes on what a user should know."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..errors import SettingsError
from ..files.regular import size_of
from ..programs.marks import Mark
from ..report.file_report import ModuleReport
from ..sources import LoraSource
from .encode import EncodedModule, Encoder
from .output import OutputFile

__all__ = ["file_notes", "module_report"]

_MOST_LOST = 0.5  # share of a module's square
_MUCH_LARGER = 1.05  # times the input, which is about what metadata add to a small file


def file_notes(lora: LoraSource, encoder: Encoder, named: torch.dtype | None) -> Iterator[str]:
    """Yield what to know of a plain file: channels that saved nothing, and a precision that is not that of the input.

    Args:
        named: the precision that was asked for, None if it was left open.
    """
    yield from _channel_notes(encoder)
    if encoder.packed or named is not None or encoder.settings.save_format == "fp8" or lora.packed:
        return
    if encoder.dtype != lora.dtype:
        stored, given = (str(dtype).removeprefix("torch.") for dtype in (encoder.dtype, lora.dtype))
        yield f"factors are stored as {stored}, those of the input are {given}: --save_precision names another precision"
        if lora.dtype.itemsize == 1 and any(lora.plain_keys(name).alpha is None for name in lora):
            yield f"8-bit floats need an alpha, which {lora.layout} files do not have: packed, with --quantize bits=8, is as small"


def rounding_notes(encoder: Encoder, stored: Mapping[str, EncodedModule]) -> list[str]:
    """Say which modules of a plain file lose most of what is kept of them to its precision, because their weights are too small.

    Raises:
        SettingsError: that is most of the whole file.
    """
    if encoder.settings.quantization.enabled:
        return []  # what codes lose is said by their error
    kept, lost = {}, {}
    for name, module in stored.items():
        analysis = encoder.components[name]
        beyond = analysis.lost + float(analysis.spectrum.sigma[module.rank :].square().sum())
        kept[name], lost[name] = analysis.norm - beyond, module.squared_error - beyond
    gone = [name for name in stored if lost[name] > _MOST_LOST * kept[name] > 0.0]
    if not gone:
        return []
    precision = str(encoder.dtype).removeprefix("torch.")
    found = f"{precision} cannot hold weights as small as those of {len(gone)} of {len(stored)} modules, {gone[0]} for one"
    remedy = "--save_precision bf16 or float can"
    if sum(lost.values()) > _MOST_LOST * sum(kept.values()):
        raise SettingsError([f"{found}, and hardly anything would be left of the LoRA: {remedy}"])
    return [f"{found}, which are nearly lost: {remedy}"]


def partner_notes(partner: Path, before: int) -> Iterator[str]:
    """Yield what to know of the plain file beside a packed one made from `before` bytes."""
    size = size_of(partner)
    if size > _MUCH_LARGER * before:
        yield f"{partner} takes {size} bytes, the input took {before}: --format packed leaves it out"


def zero_notes(output_file: OutputFile, stored: Mapping[str, EncodedModule]) -> Iterator[str]:
    """Yield what to know of modules that were dropped from a folder for PEFT."""
    if dropped := len(output_file.kept(stored)) - len(stored):
        yield f"zeros stand for the modules that were dropped ({dropped}), since PEFT makes a layer for each"


def mark_notes(marks: Mapping[str, Mark], stored: Mapping[str, EncodedModule], modules: int) -> Iterator[str]:
    """Yield, for each module that was left one component while others were dropped, which program recognises the file by it."""
    if len(stored) < modules:
        for name, mark in marks.items():
            if name in stored and stored[name].rank == 1:
                yield f"{name} keeps one component: {mark.program} recognises a {mark.kind} by it"


def _channel_notes(encoder: Encoder) -> list[str]:
    """Say that dropped channels save no bytes in a plain file."""
    if encoder.packed:
        return []
    shapes = [analysis.shape for analysis in encoder.components.values()]
    counts = [(shape.outputs, shape.kept[0]) for shape in shapes] + [(shape.inputs, shape.kept[1]) for shape in shapes]
    dropped = sum(count - len(kept) for count, kept in counts if kept is not None)
    if not dropped:
        return []
    return [f"{dropped} channels were set to zero, which saves no bytes in a plain file: a packed one leaves them out"]


def module_report(
    encoder: Encoder, output_file: OutputFile, lora: LoraSource, name: str, stored: EncodedModule | None, made: bool
) -> ModuleReport:
    """Return the report of a module. The error of one that was not encoded is not known: NaN."""
    analysis = encoder.components[name]
    shape = analysis.shape
    lost, rank, after = (
        (analysis.norm, 0, 0) if stored is None else (stored.squared_error, stored.rank, output_file.module_bytes(name, stored))
    )
    return ModuleReport(
        name,
        lora.part(name),
        (shape.outputs, shape.inputs, *shape.kernel),
        (shape.rank, rank),
        (lora.factor_bytes(name), after),
        lost if made else math.nan,
        analysis.norm,
        tuple(analysis.spectrum.sigma.tolist()),
    )
