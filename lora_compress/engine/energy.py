"""What the norms of modules say before anything is compressed: never trained, partly trained, nearly all in a few modules."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import FormatError

__all__ = ["NEVER_TRAINED", "energy_notes", "require_energy"]

NEVER_TRAINED = "every update is zero: this LoRA was never trained"
_MOST = 0.9  # share of the squared norm that few modules must hold to be noted
_FEW = 0.1  # share of the modules that are few
_NAMED = 3


def require_energy(energies: Mapping[str, float], path: str) -> None:
    """Refuse a file in which there is nothing to compress.

    Args:
        energies: ||dW||_F^2 by module.
        path: of the file.

    Raises:
        FormatError: every update is zero.
    """
    if energies and not any(energies.values()):
        raise FormatError(f"{path}: {NEVER_TRAINED}: there is nothing to compress; look for the file of a later step or epoch")


def energy_notes(energies: Mapping[str, float]) -> list[str]:
    """Return what a user should know of the modules' norms, a sentence each.

    Args:
        energies: ||dW||_F^2 by module.

    >>> energy_notes({"a": 0.0, "b": 0.0})
    ['every update is zero: this LoRA was never trained']
    >>> energy_notes({"a": 0.0, "b": 1.0})
    ['the update of 1 of 2 modules is zero, as if it had never been trained: a']
    """
    total = math.fsum(energies.values())
    if energies and not any(energies.values()):
        return [NEVER_TRAINED]
    zero = [name for name, energy in energies.items() if energy == 0.0]
    notes = []
    if zero:
        notes.append(
            f"the update of {len(zero)} of {len(energies)} modules is zero, as if it had never been trained: {_first_of(zero)}"
        )
    strongest = sorted(energies, key=lambda name: -energies[name])[: int(_FEW * len(energies))]
    held = 0.0
    for count, name in enumerate(strongest, 1):
        held += energies[name] / total
        if held >= _MOST:
            who = f"{count} of {len(energies)} {'modules hold' if count > 1 else 'module holds'}"
            notes.append(
                f"{who} {held:.1%} of the squared norm of the whole update: {_first_of(strongest[:count])}. A relative error of "
                "the file is nearly theirs alone, so that --target_error and --target_size may drop most of the others: to keep "
                "them, ask for --new_rank, or weigh errors with --base_model"
            )
            break
    return notes


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
