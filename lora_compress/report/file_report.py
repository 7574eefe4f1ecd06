"""What became of one file, module by module: what the command line, its JSON and the HTML page are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.results import Evaluation
from ..update import relative_error

__all__ = ["FileReport", "ModuleReport"]


@dataclass(frozen=True)
class ModuleReport:
    """What became of one module; pairs are (before, after).

    Args:
        name: its name in the file.
        part: U-Net, DiT, text encoder, ...
        shape: of the layer's weight, (out, in, *kernel).
        rank: components; 0 afterwards if the module was dropped.
        bytes: that it takes in the file.
        squared_error: ||dW - dW'||_F^2; NaN where the module was not made, because the file was not written.
        squared_norm: ||dW||_F^2.
        sigma: effective singular values of the input, falling.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    rank: tuple[int, int]
    bytes: tuple[int, int]
    squared_error: float
    squared_norm: float
    sigma: tuple[float, ...] = ()

    @property
    def weights(self) -> int:
        """Weights that are stored afterwards: rank * (out + in * kernel)."""
        inputs = 1
        for size in self.shape[1:]:
            inputs *= size
        return self.rank[1] * (self.shape[0] + inputs)

    @property
    def bits(self) -> float:
        """Bits per stored weight, side information included; 0 if the module was dropped."""
        return 8 * self.bytes[1] / self.weights if self.weights else 0.0

    @property
    def relative_error(self) -> float:
        """||dW - dW'||_F / ||dW||_F."""
        return relative_error(self.squared_error, self.squared_norm)


@dataclass(frozen=True)
class FileReport:
    """What became of one file; pairs are (before, after).

    Args:
        input: path that was read.
        output: path that was written, None if nothing was.
        status: "written", or "not_smaller" when the result would have been no smaller than the input.
        layout: key layout of the input, such as kohya or peft.
        family: model family, such as sdxl.
        bytes: of the two files.
        seconds: that it took.
        modules: one report for each module of the input.
        notes: what the user should be told.
        settings: flat settings by name.
        curve: (bytes, relative error) that other sizes of this file would have.
        evaluation: what was measured of the written file, if that was asked for.
    """

    input: str
    output: str | None
    status: str
    layout: str
    family: str
    bytes: tuple[int, int]
    seconds: float
    modules: tuple[ModuleReport, ...]
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    evaluation: Evaluation | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers by name: size_mb, relative_error where it is known, and what was evaluated: fid, relative_output_error, ..."""
        found = {"size_mb": self.bytes[1] / 1e6}
        if not math.isnan(self.relative_error):
            found["relative_error"] = self.relative_error
        return found | (self.evaluation.metrics if self.evaluation is not None else {})

    @property
    def relative_error(self) -> float:
        """||dW - dW'||_F / ||dW||_F over the whole file; NaN where nothing was made that could have an error."""
        return relative_error(sum(m.squared_error for m in self.modules), sum(m.squared_norm for m in self.modules))

    @property
    def bits_per_weight(self) -> float:
        """Bits of the written file, header and all, per weight that it stores; NaN where nothing was made."""
        if math.isnan(self.relative_error):
            return math.nan
        weights = sum(module.weights for module in self.modules)
        return 8 * self.bytes[1] / weights if weights else 0.0

    def as_json(self) -> dict[str, Any]:
        """The numbers of `--json`."""
        return {
            "input": self.input,
            "output": self.output,
            "status": self.status,
            "layout": self.layout,
            "family": self.family,
            "bytes_in": self.bytes[0],
            "bytes_out": self.bytes[1],
            "relative_error": _known(self.relative_error),
            "bits_per_weight": _known(self.bits_per_weight),
            "modules": sum(1 for module in self.modules if module.rank[1]),
            "modules_in": len(self.modules),
            "seconds": self.seconds,
            "notes": list(self.notes),
            **({"evaluation": self.evaluation.as_json()} if self.evaluation is not None else {}),
        }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
