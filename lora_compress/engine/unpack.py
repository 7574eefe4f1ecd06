"""Packed files turned into plain ones (expand), and progressive ones cut to a smaller size (truncate)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError, SettingsError
from ..files.dtypes import TensorSpec
from ..files.metadata import ModuleScale, true_header
from ..files.regular import have_same_path, size_of
from ..files.writer import TensorWriter, atomic_path, safetensors_size
from ..layouts.peft_folder import MAGNITUDE
from ..packed.file import INDEX_KEY, PAYLOAD_KEY, PackedFile, is_packed
from ..packed.index import PackedIndex
from ..packed.module import stage_count
from ..parallel import each_module
from ..pruning import consumer_minimum
from ..report.file_report import FileReport, ModuleReport
from ..sources.open import open_lora, require_readable
from ..update import LowRankUpdate, squared_error
from .adapter_output import AdapterOutput
from .in_memory import partner_metadata, plain_partner

__all__ = ["check_target", "expand_file", "read_expanded", "truncate_file", "write_expanded", "write_tensors"]

_LEAST_RANK = 2  # of a plain file


def expand_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    save_dtype: torch.dtype | None = None,
    force: bool = False,
    peft_config: str | os.PathLike[str] | None = None,
) -> FileReport:
    """Write a packed file as a plain one, in the key layout of the file that it was made from.

    Example:
        >>> expand_file("packed.safetensors", "plain.safetensors").status
        'written'

    Args:
        source: a packed file.
        target: a file whose name ends with .safetensors, or a folder for PEFT where the packed file was made of one.
        save_dtype: of the factors; None for float16.
        force: `target` may be `source`.
        peft_config: adapter_config.json that a folder is to have, where the packed file does not remember it.

    Raises:
        FormatError: the input is no packed file, or damaged.
        SettingsError: the target can be no result.
        SaveError: the target cannot be written.
    """
    begun = time.monotonic()
    output = AdapterOutput.of(Path(source), target, peft_config, force=force)
    check_target(source, output.weights, force)
    before = size_of(source)
    lora = PackedFile(source) if is_packed(source) else None
    if lora is None:
        open_lora(source).close()  # of what is no LoRA at all it says what it is
        raise FormatError(f"{source}: is no packed file: there is nothing to expand")
    dtype = save_dtype or torch.float16
    ranks = {name: max(lora.decoded_rank(name), _LEAST_RANK) for name in lora}
    has_dora = any(MAGNITUDE in key for key in lora.carried)
    with atomic_path(output.weights) as temporary, output.written_beside(ranks, has_dora, has_all=False):
        errors: dict[str, tuple[float, float]] = {}
        written = write_expanded(lora, temporary, dtype, errors)
        require_readable(temporary, output.weights, len(written))
    modules = []
    for name, update in written:
        size = update.numel * dtype.itemsize
        shape = (update.up.shape[0], *update.down.shape[1:])
        modules.append(
            ModuleReport(name, lora.part(name), shape, (update.rank, update.rank), (lora.factor_bytes(name), size), *errors[name])
        )
    report = _report((source, output.weights), before, lora, modules, begun)
    return replace(report, output=str(target), notes=(*report.notes, *output.notes()))


def truncate_file(source: str | os.PathLike[str], target: str | os.PathLike[str], size: int, *, force: bool = False) -> FileReport:
    """Cut a progressive packed file to a smaller one: header and index are written anew, the beginning of the payload is copied.

    Example:
        >>> truncate_file("progressive.safetensors", "cut.safetensors", size=12_000).bytes[1] <= 12_000
        True

    Args:
        source: a packed file that was compressed with strategy=entropy and progressive=true.
        target: the file to write.
        size: bytes that it may have at most.
        force: `target` may be `source`.

    Raises:
        FormatError: the input is no packed file, not a progressive one, or `size` has no room for a first stage of every module.
        SaveError: the target cannot be written.
    """
    begun = time.monotonic()
    check_target(source, target, force)
    before, lora = size_of(source), PackedFile(source)
    if not (lora.entries and all(stage_count(entry) > 1 for entry in lora.entries.values())):
        raise FormatError(f"{source}: is not progressive: compress the original with --quantize strategy=entropy progressive=true")
    metadata = {key: value for key, value in lora.metadata.items() if key != "ss_compress_relative_error"}  # true no more
    carried, room = lora.carried, size
    for _ in range(8):  # a shorter payload has a shorter index
        index, payload = lora.index.cut(max(room, 0))
        encoded = index.without_empty(consumer_minimum(_bytes_by_name(index), lora.family)).encode()
        specs = {INDEX_KEY: TensorSpec.of(encoded), PAYLOAD_KEY: TensorSpec(torch.uint8, (payload,))} | dict(carried)
        whole = safetensors_size(specs, metadata)
        if whole <= size:
            break
        room = min(room, payload) - max(whole - size, 1)
    if whole > size or index.missing:
        raise FormatError(f"{source}: {size} bytes have no room for the first layer of every module: take a larger --truncate")
    with atomic_path(target) as temporary:
        with TensorWriter(temporary, specs, metadata) as writer:
            write_tensors(writer, lora.others)
            beginning = torch.frombuffer(bytearray(lora.payload(payload)), dtype=torch.uint8)
            write_tensors(writer, {INDEX_KEY: encoded, PAYLOAD_KEY: beginning})
        modules = _truncated(lora, PackedFile(temporary))
    return _report((source, target), before, lora, modules, begun)


def _bytes_by_name(index: PackedIndex) -> dict[str, int]:
    found = dict.fromkeys((entry.name for entry in index.entries), 0)
    for module, length, _ in index.chunks:
        found[index.entries[module].name] += length
    return found


def _truncated(lora: PackedFile, cut: PackedFile) -> list[ModuleReport]:
    """Report what became of the modules of a file that was cut."""

    def report(name: str, whole: LowRankUpdate) -> ModuleReport:
        less = cut.get(name)
        error, norm = squared_error(whole, less)
        left, rank = (0, 0) if less is None else (cut.factor_bytes(name), less.rank)
        shape = (whole.up.shape[0], *whole.down.shape[1:])
        return ModuleReport(name, lora.part(name), shape, (whole.rank, rank), (lora.factor_bytes(name), left), error, norm)

    return list(each_module(report, lora).values())


def check_target(source: str | os.PathLike[str], target: str | os.PathLike[str], force: bool) -> None:
    """Refuse a target that cannot be a result, before any work is done.

    Raises:
        SettingsError: it does not end with .safetensors, or it is the source and `force` is not given.
    """
    if Path(target).suffix != ".safetensors":
        raise SettingsError([f"{target}: a LoRA is written as a safetensors file: end its name with .safetensors"], "output")
    if not force and os.path.exists(target) and have_same_path(source, target):
        raise SettingsError([f"{target}: is the input itself: choose another name, or --force to replace it"], "output")


def _report(
    paths: tuple[str | os.PathLike[str], str | os.PathLike[str]],
    before: int,
    lora: PackedFile,
    modules: Iterable[ModuleReport],
    begun: float,
) -> FileReport:
    source, target = map(str, paths)
    sizes, seconds = (before, size_of(target)), time.monotonic() - begun
    return FileReport(source, target, "written", lora.layout, lora.family, sizes, seconds, tuple(modules), tuple(lora.notes))


def write_expanded(
    packed: PackedFile, path: Path, dtype: torch.dtype, errors: dict[str, tuple[float, float]] | None = None
) -> list[tuple[str, LowRankUpdate]]:
    """Write a packed file as a plain one and return the modules, without their weights.

    Args:
        packed: the input.
        path: of the file to write.
        dtype: of the factors.
        errors: gets ||dW - dW'||_F^2 and ||dW||_F^2 of each module, which is what rounding to `dtype` costs.
    """
    specs, outline = dict(packed.carried), {}
    for name, entry in packed.entries.items():
        rank = max(packed.decoded_rank(name), _LEAST_RANK)
        down, up = (rank, entry.inputs, *entry.kernel), (entry.outputs, rank, *(1,) * len(entry.kernel))
        specs |= entry.keys.specs(name, down, up, dtype)
        alpha = 1.0 if entry.keys.alpha is not None else float(rank)
        outline[name] = LowRankUpdate(torch.empty(down, device="meta"), torch.empty(up, device="meta"), alpha)
    metadata = packed.plain_metadata({name: update.rank for name, update in outline.items()})
    scales = {name: ModuleScale(update.rank, update.alpha / packed.entries[name].rank) for name, update in outline.items()}
    with TensorWriter(path, specs, partner_metadata(true_header(metadata, scales), outline)) as writer:
        write_tensors(writer, packed.others)
        for name in packed:
            keys, exact = packed.entries[name].keys, packed[name]
            plain = plain_partner(exact, dtype, keys.alpha is not None)
            write_tensors(writer, keys.tensors(name, plain))
            if errors is not None:
                errors[name] = squared_error(exact, plain)
    return list(outline.items())


def read_expanded(path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Return the tensors of the file that `expand_file` would make of a packed one, by key.

    Raises:
        FormatError: the input is no packed file, damaged, or cut so early that modules are missing.
    """
    packed = PackedFile(path)
    packed.require_whole()
    tensors = dict(packed.others)
    for name in packed:
        keys = packed.entries[name].keys
        tensors |= keys.tensors(name, plain_partner(packed[name], dtype, keys.alpha is not None))
    return tensors


def write_tensors(writer: TensorWriter, tensors: Mapping[str, Tensor]) -> None:
    """Write all of some tensors."""
    for key, tensor in tensors.items():
        writer.write(key, tensor)
