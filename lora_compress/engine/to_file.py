"""Compressing a file: the whole road from a LoRA in any layout to a smaller file, reading and writing one module at a time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from ..errors import SettingsError
from ..files.metadata import header_notes
from ..files.regular import size_of
from ..files.writer import TensorWriter, atomic_path, safetensors_size
from ..layouts.numbered import is_numbered
from ..layouts.peft_folder import MAGNITUDE, weights_of
from ..layouts.plain import PlainKeys
from ..packed.chunks import Spool, payload_tensor
from ..packed.file import INDEX_KEY, PAYLOAD_KEY, PackedFile
from ..programs.marks import recognition_marks
from ..programs.table import ConsumerRules, PlannedFile, PlannedModule
from ..report.file_report import FileReport
from ..settings import CompressionSettings
from ..sources import LoraSource
from ..sources.open import open_lora, require_readable
from ..update import LowRankUpdate
from ..weighting import Calibration, base_norms, relative_weights
from .adapter_output import AdapterOutput
from .analysis import Decomposition
from .context import FileContext, Plan
from .curve import size_curve
from .decompose import decomposition_of
from .encode import EncodedModule, Encoder, pad_to_two
from .energy import energy_notes, require_energy
from .estimate import plan_in, surely_larger
from .in_memory import kohya_partner
from .output import OutputFile
from .precision import file_precision, file_precisions
from .reporting import file_notes, mark_notes, module_report, partner_notes, rounding_notes, zero_notes
from .unpack import check_target, write_expanded, write_tensors

__all__ = ["compress_file"]

Progress = Callable[[int, int], None]


def compress_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    settings: CompressionSettings,
    *,
    save_dtype: torch.dtype | None = None,
    consumers: Collection[str] = (),
    base_model: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    force: bool = False,
    repair: bool = False,
    untrained: bool = False,
    progress: Progress | None = None,
    details: Mapping[str, str] | None = None,
    alpha: float | None = None,
    peft_config: str | os.PathLike[str] | None = None,
) -> FileReport:
    """Compress the LoRA in `source` into `target`.

    Args:
        source: a LoRA file of any layout, or a folder that PEFT wrote.
        target: a file whose name ends with .safetensors, or a folder for PEFT where the input has an adapter_config.json.
        settings: what to remove and how to store the rest.
        save_dtype: of plain factors; None leaves it to `precision.budget_precisions` where the settings have a budget, and keeps
            the input's otherwise.
        consumers: programs that must be able to load the result; see `consumers.CONSUMERS`.
        base_model: checkpoint relative to whose layers components are judged.
        calibration: file of activation statistics of this LoRA.
        force: `target` may be `source`.
        repair: mend a broken input where that is possible.
        untrained: accept an input whose every update is zero, as a training saves before its first step.
        progress: called with (modules done, modules in all); it counts anew in every pass, of which a search for a size or an error
            takes several.
        details: more entries for the metadata, as ss_compress_* keys.
        alpha: of modules whose alpha the input does not tell, where that is not their rank.
        peft_config: adapter_config.json of the input, where it does not lie beside it.

    Example:
        >>> report = compress_file("lora.safetensors", "small.safetensors", CompressionSettings.parse({"bits": 4}))
        >>> report.status, report.relative_error < 0.2
        ('written', True)

    Returns:
        The report. Its status is not_smaller, and nothing has been written, if the result would be no smaller than the input and
        `settings.budget.allow_larger` is not set. Where that is sure from the spectra, nothing has been encoded either.

    Raises:
        FormatError: the input cannot be read, or every update in it is zero.
        SettingsError: settings that contradict each other, the input or a consumer; a budget that cannot be met.
        SaveError: the target cannot be written.
    """
    begun = time.monotonic()
    asked, source = (source, target), weights_of(source)
    output = AdapterOutput.of(source, target, peft_config, packed=settings.save_format in ("packed", "both"), force=force)
    target, details = output.weights, {**(details or {}), **output.details()}
    check_target(source, target, force)
    with closing(open_lora(source, repair, alpha=alpha, peft_config=peft_config)) as lora:
        if output.is_folder:
            _check_for_peft(lora, asked[1])
        rules = ConsumerRules.named(consumers)
        if rules.consumers or settings.save_format in ("packed", "both"):
            lora.leave_numbers()
        of_plain = ConsumerRules() if settings.save_format == "packed" else rules
        decompose = decomposition_of(lora, settings, Calibration(calibration) if calibration else None)
        spool = partial(Spool, next(folder for folder in Path(target).absolute().parents if folder.is_dir()))
        encoder, output_file = _prepare(lora, settings, save_dtype, of_plain, decompose, spool, details, progress, output.is_folder)
        energies = {name: analysis.norm for name, analysis in encoder.components.items()}
        if not untrained:
            require_energy(energies, str(source))
        weights = relative_weights(lora, base_norms(base_model, lora)) if base_model else {}
        marks = recognition_marks(energies, lora.family)
        parts = {name: lora.part(name) for name in lora}
        numbered = [name for name, analysis in encoder.components.items() if is_numbered(analysis.shape.keys)]
        kept = frozenset((*marks, *numbered, *of_plain.kept_whole(lora)))
        context = FileContext(output_file.size, parts, weights, kept, of_plain.one_rank(lora.layout, lora.family))
        before, larger = size_of(source), settings.budget.allow_larger
        precisions = (encoder.dtype,) if save_dtype is not None else file_precisions(lora, encoder, of_plain)
        encoder.dtype = precisions[0]
        if not larger and (expected := surely_larger(encoder, context, before)) is not None:
            modules = tuple(module_report(encoder, output_file, lora, name, None, made=False) for name in encoder.components)
            sizes, notes = (before, expected), (*lora.notes, *energy_notes(energies))
            about = (str(asked[0]), None, "not_smaller", lora.layout, lora.family, sizes, time.monotonic() - begun)
            return FileReport(*about, modules, notes, settings.as_dict())
        chosen = plan_in(encoder, context, precisions)
        if encoder.packed:
            stored = chosen.stored if chosen.stored is not None else dict(encoder.run(chosen.choices))
        else:
            stored = encoder.outline(chosen.choices)
        if not stored:
            raise SettingsError(["nothing is left of the LoRA: choose a smaller threshold or a larger budget"], str(source))
        if lost := [name for name in numbered if name not in stored or (encoder.packed and stored[name].entry is None)]:
            found = f"{lost[0]} is zero and would be left out of a file whose modules are known by their numbers"
            raise SettingsError([f"{found}: use save_format=kohya, or a strategy other than entropy"], str(source))
        planned = _planned(lora, settings, encoder.dtype, {name: module.rank for name, module in stored.items()})
        if problems := rules.problems(planned):
            raise SettingsError(problems, str(source))
        specs, metadata = output_file.specs(stored), output_file.finished_metadata(stored)
        after = safetensors_size(specs, metadata)
        written = after < before or larger
        begin = partial(TensorWriter, specs=specs, metadata=metadata)
        if written and encoder.packed:
            _write_packed(output_file, lora, stored, target, begin, save_dtype, spool)
        elif written:
            stored = _write_plain(encoder, output_file, lora, stored, chosen, output, begin)
        told = (
            *rules.notes(planned),
            *file_notes(lora, encoder, save_dtype),
            *zero_notes(output_file, stored),
            *(rounding_notes(encoder, stored) if written and not encoder.packed else ()),
            *mark_notes(marks, stored, len(lora)),
        )
        if settings.save_format == "both":
            told = tuple(partner_notes(kohya_partner(target), before)) if written else ()
        made = written or encoder.packed
        modules = tuple(module_report(encoder, output_file, lora, name, stored.get(name), made) for name in encoder.components)
        curve = size_curve(encoder, after - sum(module.bytes[1] for module in modules))
    return FileReport(
        str(asked[0]),
        str(asked[1]) if written else None,
        "written" if written else "not_smaller",
        lora.layout,
        lora.family,
        (before, after),  # and not what another writer may have put there since
        time.monotonic() - begun,
        modules,
        (
            *lora.notes,
            *energy_notes(energies),
            *((*told, *output.notes(), *header_notes(lora.metadata, metadata)) if written else ()),
        ),
        settings.as_dict(),
        curve,
    )


def _check_for_peft(lora: LoraSource, target: str | os.PathLike[str]) -> None:
    """Raises: SettingsError: PEFT could not read a plain file of these modules."""
    strange = [name for name in lora if not re.search(r"lora_(embedding_)?A", lora.plain_keys(name).down)]
    if strange:
        problem = (
            f"is a folder for PEFT, which could not read {strange[0]}: it comes out under kohya's keys: name a safetensors file"
        )
        raise SettingsError([f"{target}: {problem}"], str(lora.path))


def _prepare(
    lora: LoraSource,
    settings: CompressionSettings,
    save_dtype: torch.dtype | None,
    rules: ConsumerRules,
    decompose: Callable[[Mapping[str, LowRankUpdate]], dict[str, Decomposition]],
    spool: Callable[[], Spool],
    details: Mapping[str, str],
    progress: Progress | None,
    keeps_all: bool,
) -> tuple[Encoder, OutputFile]:
    """Analyse the modules of the input, and prepare the file that they go to."""
    dtype = file_precision(lora, settings, save_dtype, rules)

    def pad(ranks: Mapping[str, int]) -> dict[str, int]:
        adapted = rules.adaptation(_planned(lora, settings, encoder.dtype, ranks)).ranks
        return dict(adapted) if lora.layout == "cloneofsimo" else pad_to_two(adapted)  # its one reader knows every rank

    encoder = Encoder(lora, settings, dtype, decompose, lora.plain_keys, pad, spool, progress)
    extras = {name: lora.extra_specs(name) for name in lora}
    return encoder, OutputFile(
        settings,
        encoder.components,
        lambda: encoder.dtype,
        lora.layout,
        lora.plain_metadata,
        lora.carried,
        extras,
        details,
        keeps_all,
    )


def _planned(lora: LoraSource, settings: CompressionSettings, dtype: torch.dtype, ranks: Mapping[str, int]) -> PlannedFile:
    """Return what the rules of programs must know of the file that is about to be written."""
    modules = {name: PlannedModule(rank, 1.0, lora.part(name), tuple(lora.extra_specs(name))) for name, rank in ranks.items()}
    return PlannedFile(str(settings.save_format), dtype, lora.layout, lora.family, modules, tuple(lora.carried))


def _write_plain(
    encoder: Encoder,
    output_file: OutputFile,
    lora: LoraSource,
    outline: Mapping[str, EncodedModule],
    chosen: Plan,
    output: AdapterOutput,
    begin: Callable[[Path], TensorWriter],
) -> dict[str, EncodedModule]:
    """Encode the modules of a plain file and write each in the thread that made it.

    Returns:
        The modules without their factors, for the report.
    """

    def keys(name: str) -> PlainKeys:
        return encoder.components[name].shape.keys

    def write(name: str, module: EncodedModule) -> EncodedModule:
        assert module.plain is not None
        write_tensors(writer, keys(name).factors(name, module.plain))
        return module.without_factors()

    alpha = encoder.file_alpha(chosen.choices)
    shrunk = any(key.startswith("ss_compress_") for key in lora.metadata)  # before: modules may be missing from it
    has_dora = any(MAGNITUDE in key for key in output_file.passed_on(outline))
    with atomic_path(output.weights) as temporary, output.written_beside(output_file.ranks(outline), has_dora, not shrunk):
        with begin(temporary) as writer:
            _pass_on(writer, lora, output_file.kept(outline))
            write_tensors(writer, {key: zeros.contiguous() for key, zeros in output_file.placeholders(outline).items()})
            for name in outline:  # first, as in the file: the hash of its data is taken on the way
                write_tensors(writer, keys(name).alphas(name, alpha))
            stored = dict(encoder.run(chosen.choices, alpha=alpha, sink=write))
            rounding_notes(encoder, stored)  # which refuses a file of nothing but zeros before it has its name
            writer.metadata = output_file.finished_metadata(stored)
        if lora.packed:  # its index names its keys itself; those of a plain one have been read already
            require_readable(temporary, output.weights, len(output_file.kept(outline)))
    return stored


def _write_packed(
    output_file: OutputFile,
    lora: LoraSource,
    stored: Mapping[str, EncodedModule],
    target: str | os.PathLike[str],
    begin: Callable[[Path], TensorWriter],
    dtype: torch.dtype | None,
    spool: Callable[[], Spool],
) -> None:
    """Write the packed file, and with save_format=both the plain one beside it: both of them, or neither."""
    index, chunks = output_file.packed(stored)
    with atomic_path(target) as temporary:
        with begin(temporary) as writer:
            _pass_on(writer, lora, stored)
            write_tensors(writer, {INDEX_KEY: index.encode(), PAYLOAD_KEY: payload_tensor(chunks, spool())})
        if output_file.settings.save_format == "both":
            with atomic_path(kohya_partner(target)) as beside:
                write_expanded(PackedFile(temporary), beside, dtype or output_file.dtype())


def _pass_on(writer: TensorWriter, lora: LoraSource, kept: Iterable[str]) -> None:
    """Write the tensors of the input that are no factors, unchanged."""
    write_tensors(writer, lora.others)
    for name in kept:
        write_tensors(writer, lora.extras(name))
