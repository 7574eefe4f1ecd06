"""What the compressed file may weigh, or what it may lose: the budget that ranks and bits are chosen for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

__all__ = ["BudgetSettings", "parse_size"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class BudgetSettings:
    """At most one of a size and an error; errors are ||dW - dW'||_F / ||dW||_F over all modules, or over one part of the model.

    A file that would be no smaller than the one it is made from is not written, unless `allow_larger` accepts its size.
    """

    target_size: str | None = field(default=None, metadata={"help": "bytes of the written file at most: 20MB, 19.5MiB, 800kB"})
    target_error: float | None = field(default=None, metadata={"help": "relative error of the whole file at most, in (0, 1)"})
    target_error_unet: float | None = field(
        default=None, metadata={"help": "relative error of the U-Net or DiT at most, in (0, 1)"}
    )
    target_error_text_encoder: float | None = field(
        default=None, metadata={"help": "relative error of each text encoder at most, in (0, 1)"}
    )

    allow_larger: bool = field(default=False, metadata={"help": "files: write a result even where it is no smaller than its input"})

    @property
    def enabled(self) -> bool:
        """Whether anything is asked for."""
        return self.target_size is not None or any(error is not None for error in self._errors.values())

    @property
    def size(self) -> int | None:
        """target_size in bytes."""
        return None if self.target_size is None else parse_size(self.target_size)

    def part_error(self, part: str) -> float | None:
        """The target of one part of the model: target_error_text_encoder for "text encoder ...", else target_error_unet."""
        return self.target_error_text_encoder if part.startswith("text encoder") else self.target_error_unet

    @property
    def _errors(self) -> dict[str, float | None]:
        names = ("target_error", "target_error_unet", "target_error_text_encoder")
        return {name: getattr(self, name) for name in names}

    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = []
        errors = {name: value for name, value in self._errors.items() if value is not None}
        found += [f"{name}={value:g}: must lie in (0, 1)" for name, value in errors.items() if not 0.0 < value < 1.0]
        if self.target_size is not None:
            try:
                parse_size(self.target_size)
            except ValueError as error:
                found.append(f"target_size={self.target_size}: {error}")
            if errors:
                found.append(f"target_size and {', '.join(errors)} are two budgets: give one")
        return found


def parse_size(text: str) -> int:
    """Bytes of `20MB` (decimal), `19.5MiB` (binary) or a plain number of bytes.

    Raises:
        ValueError: no size, or not above 0.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError("must be a size such as 20MB, 19.5MiB or 800kB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if not 1.0 <= size < math.inf:
        raise ValueError("must be at least one byte")
    return int(size)
