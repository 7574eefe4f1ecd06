"""What a search for a budget must know of the file around the modules, and what it finds: a plan for all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from ..errors import SettingsError
from ..quantization import ModulePlan
from ..settings import BudgetSettings
from .encode import EncodedModule

__all__ = ["FileContext", "Plan", "error_targets", "payload_size", "require_room"]


@dataclass(frozen=True)
class FileContext:
    """What a search for a budget must know of a file besides its modules.

    Args:
        file_size: returns the bytes of the whole file for encoded modules.
        parts: the part of the model that each module is in.
        weights: of the modules' squared errors, 1 where absent.
        protected: modules by which programs recognise the file, so that none of them is dropped.
        one_rank: whether all modules of a part are padded to one rank.
    """

    file_size: Callable[[Mapping[str, EncodedModule]], int]
    parts: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    protected: Collection[str] = ()
    one_rank: bool = False


@dataclass(frozen=True)
class Plan:
    """The plan of every module, and the encoded modules where they had to be made to find it (packed files alone)."""

    choices: dict[str, ModulePlan]
    stored: dict[str, EncodedModule] | None = None


def error_targets(budget: BudgetSettings, parts: Mapping[str, str]) -> dict[str, float]:
    """Return the relative errors that are asked for, by part of the model; the whole file is the part "".

    Without one for the whole file, parts that have none of their own keep to the smallest that is given.
    """
    targets = {part: error for part in sorted(set(parts.values())) if (error := budget.part_error(part)) is not None}
    if budget.target_error is not None:
        return {"": budget.target_error, **targets}
    given = [error for error in (budget.target_error_unet, budget.target_error_text_encoder) if error is not None]
    return {part: targets.get(part, min(given)) for part in sorted(set(parts.values()))}


def require_room(budget: int, least: int) -> None:
    """Raises: SettingsError: a size has no room for any module, since a file without modules takes `least` bytes already."""
    if least > budget:
        found = f"header, metadata and tensors that belong to no module take {least} bytes alone"
        raise SettingsError([f"target_size: {budget} bytes are too few: {found}; take a larger target_size"])


def payload_size(stored: Mapping[str, EncodedModule]) -> int:
    """Return the bytes that coding made of all modules."""
    return sum(module.payload for module in stored.values())
