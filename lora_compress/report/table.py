"""The table at the end of a compression, and the same numbers for trackers and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

from ..names.families import part_of
from ..text import visible
from ..update import relative_error

if TYPE_CHECKING:  # rich is imported where a table is drawn: the plug-ins of other programs work without it
    from rich.table import Table

__all__ = ["CompressionReport", "PartReport", "render", "settings_table"]


@dataclass(frozen=True)
class PartReport:
    """What became of one part of the model, U-Net, DiT or a text encoder; pairs are (before, after).

    Args:
        modules: modules with an update.
        components: rank, summed over the modules.
        squared_error: ||dW - dW'||_F^2, summed over the modules.
        squared_norm: ||dW||_F^2 likewise.
        trained: the same two sums against the weights of this step before they were masked or quantized, where a training computes
            with masked or quantized ones; None where the two are one.
    """

    modules: tuple[int, int]
    components: tuple[int, int]
    squared_error: float
    squared_norm: float
    trained: tuple[float, float] | None = None

    @property
    def relative_error(self) -> float:
        """||dW - dW'||_F / ||dW||_F over the whole part, dW being what the layers computed with: the error of saving."""
        return relative_error(self.squared_error, self.squared_norm)

    @property
    def trained_error(self) -> float:
        """||dW - dW'||_F / ||dW||_F over the whole part, dW being the uncompressed weights: the error of the compression."""
        return relative_error(*self._trained)

    @property
    def _trained(self) -> tuple[float, float]:
        return self.trained or (self.squared_error, self.squared_norm)

    def __add__(self, other: PartReport) -> PartReport:
        return PartReport(
            (self.modules[0] + other.modules[0], self.modules[1] + other.modules[1]),
            (self.components[0] + other.components[0], self.components[1] + other.components[1]),
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
            None if self.trained is other.trained is None else _sums(self._trained, other._trained),
        )


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did: a `PartReport` for each part, and the bytes of the file (before, after).

    Before is the file that sd-scripts' own network would have written, at the same precision, metadata apart.
    """

    parts: dict[str, PartReport]
    bytes: tuple[int, int]

    @classmethod
    def of_modules(cls, modules: Mapping[str, PartReport], sizes: tuple[int, int]) -> CompressionReport:
        """Sum up the reports of single modules by the part that their name begins with."""
        parts: dict[str, PartReport] = {}
        family = "sd1" if any(part_of(name, "") == "U-Net" for name in modules) else ""  # conv_in alone could be of either
        for name, module in modules.items():
            part = part_of(name, family)
            parts[part] = parts[part] + module if part in parts else module
        return cls(parts, sizes)

    @property
    def total(self) -> PartReport:
        """All parts together."""
        return sum(self.parts.values(), PartReport((0, 0), (0, 0), 0.0, 0.0))

    def metrics(self) -> dict[str, float]:
        """The numbers as trackers take them (TensorBoard, W&B)."""
        total = self.total
        pairs = {"modules": total.modules, "components": total.components, "bytes": self.bytes}
        values = {
            f"compress/{name}_{when}": float(pair[i]) for name, pair in pairs.items() for i, when in enumerate(("before", "after"))
        }
        values["compress/relative_error"] = total.trained_error
        return values if total.trained is None else values | {"compress/saving_error": total.relative_error}

    def __str__(self) -> str:
        from rich.table import Table

        table = Table(title="compressed LoRA")
        saving = ["of saving alone"] if self.total.trained is not None else []
        for heading in ("part", "modules", "components (rank)", "size", "relative error of the update", *saving):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        rows = [*self.parts.items(), ("all", self.total)] if len(self.parts) > 1 else [("all", self.total)]
        for name, part in rows:
            size = f"{_megabytes(self.bytes[0])} -> {_megabytes(self.bytes[1])}" if name == "all" else ""
            errors = [part.trained_error, *([part.relative_error] if saving else [])]
            table.add_row(name, _arrow(part.modules), _arrow(part.components), size, *(f"{error:.2%}" for error in errors))
        return render(table)


def settings_table(settings: Mapping[str, object], title: str) -> str:
    """Settings as a two-column table; None is shown as a dash."""
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "value", title=title)
    for name, value in settings.items():
        table.add_row(Text(visible(name)), Text("-" if value is None else visible(str(value))))
    return render(table)


def render(table: Table) -> str:
    """A rich table as plain text for the log."""
    from rich.console import Console

    stream = StringIO()
    Console(file=stream, width=110, no_color=True).print(table)
    return stream.getvalue().rstrip()


def _sums(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def _arrow(pair: tuple[int, int]) -> str:
    return f"{pair[0]} -> {pair[1]}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
