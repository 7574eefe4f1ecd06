"""Which programs open a finished file, and why the others do not: the rules of consumers.py on what is in the file."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from ..layouts.plain import FP8
from ..sources import LoraSource
from ..sources.open import open_lora
from .table import Consumer, ConsumerRules, PlannedFile, PlannedModule

__all__ = ["Verdict", "check_file"]


@dataclass(frozen=True)
class Verdict:
    """What one program makes of a file.

    Args:
        name: of the program, as `--for` takes it.
        title: of the program, as messages name it.
        opens: whether it loads the file and computes the update that the file says.
        reasons: why not.
        notes: what it needs, or leaves out.
    """

    name: str
    title: str
    opens: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As `check --json` prints it."""
        return asdict(self)


def check_file(path: str | os.PathLike[str], consumers: Collection[str]) -> list[Verdict]:
    """A verdict for each of `consumers`, names of CONSUMERS or `all`, in the order in which they are named.

    Raises:
        FormatError: the file cannot be read.
        SettingsError: a program is not known.
    """
    rules = ConsumerRules.named(consumers)
    source = open_lora(path)
    try:
        if source.packed:
            others = (*source.carried, *(key for name in source for key in source.extra_specs(name)))
            file = PlannedFile("packed", source.dtype, source.layout, source.family, {}, others)
            return [_of_packed(consumer, file) for consumer in rules.consumers]
        file = _as_it_is(source)
        return [_of_plain(consumer, file) for consumer in rules.consumers]
    finally:
        source.close()


def _as_it_is(source: LoraSource) -> PlannedFile:
    modules = {}
    for name, update in source.items():
        modules[name] = PlannedModule(update.rank, update.alpha, source.part(name), tuple(source.extra_specs(name)))
    save_format = "fp8" if source.dtype == FP8 else "kohya"
    return PlannedFile(save_format, source.dtype, source.layout, source.family, modules, tuple(source.carried))


def _of_packed(consumer: Consumer, file: PlannedFile) -> Verdict:
    rules = ConsumerRules((consumer,))
    reasons = rules.problems(file)
    return Verdict(consumer.name, consumer.title, not reasons, tuple(reasons), () if reasons else tuple(rules.notes(file)))


def _of_plain(consumer: Consumer, file: PlannedFile) -> Verdict:
    rules = ConsumerRules((consumer,))
    needed, reasons = rules.adaptation(file), rules.problems(file)
    remedy = f"write it again with `resize_lora_ext.py --for {consumer.name} --allow_larger`"
    if any(module.rank < needed.ranks[name] for name, module in file.modules.items()):
        what = "ranks that differ" if rules.one_rank(file.layout, file.family) else f"ranks under {rules.least_rank}"
        reasons.append(f"{consumer.title} scales {what} wrongly: {remedy}")
    if needed.alpha is not None:
        reasons.append(f"{consumer.title} mixes up alphas that differ or are negative: {remedy}")
    if needed.merge_mid:
        reasons.append(f"{consumer.title} refuses lora_mid ({len(needed.merge_mid)} modules): {remedy}")
    notes = [note for note in rules.notes(file) if "padded with zeros" not in note]  # of writing, not of reading
    if file.family in consumer.no_models_of:
        notes.append(f"{consumer.title} has no models of {file.family}")
    return Verdict(consumer.name, consumer.title, not reasons, tuple(reasons), tuple(notes))
