"""Coding one module: its components become the bytes of a packed file, and back.

The bytes of a module are one chunk, or several *stages* of a progressive payload, each of which refines the ones before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError
from ..quantization import MIXED, FixedFormat, decode_fixed, encode_fixed
from ..quantization.entropy.codec import SINGLE, components_told, decode_entropy, encode_entropy, predict_entropy
from ..quantization.entropy.stages import Layering
from ..settings import QuantizationSettings
from ..update import LowRankUpdate
from .index import ModuleRecord

__all__ = [
    "LEAST_PLANES",
    "MOST_PLANES",
    "Coded",
    "ModulePlan",
    "decode_module",
    "decode_rows",
    "decoded_rank",
    "encode_module",
    "spread_channels",
    "stage_count",
    "stage_place",
    "take_channels",
]


LEAST_PLANES, MOST_PLANES = 6, 16  # bit planes of a progressive payload: fewer would make its smallest cut too large
_STAGES_PER_PLANE = {0: 1, 8_000: 2, 40_000: 4}  # by the number of weights: each stage costs some bytes of its own
_LARGEST = 1 << 31  # largest whole number that is accepted among the parameters of a codec
_SCALES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_DTYPES = {name: dtype for dtype, name in _SCALES.items()}


@dataclass(frozen=True)
class ModulePlan:
    """What was decided for one module: how many components it keeps, and how they are coded.

    Args:
        rank: components to keep, 0 to drop the module.
        bits: of each component, falling; None where all have the bits of the settings.
        step: step size of the quantizer for entropy coding, None for codes of fixed width.
        phase: by how many eighths of an octave the step size of a progressive payload is coarser than that of the file.
        planes: bit planes of a progressive payload.
        left: how many components coding leaves of these, where that is known already.
    """

    rank: int
    bits: tuple[int, ...] | None = None
    step: float | None = None
    phase: int = 0
    planes: int = LEAST_PLANES
    left: int | None = None

    @property
    def stored(self) -> int:
        """Number of components that the file gets."""
        return self.rank if self.left is None else self.left


@dataclass(frozen=True)
class Coded:
    """A module as a packed file stores it.

    Args:
        entry: its record for the index. Entropy coding may round every component to zero: its rank is 0 then.
        chunks: the stages of its payload.
        rows: what they decode to, down (rank, kept inputs * kernel) and up (rank, kept outputs).
        places: which of the components that were given these are.
    """

    entry: ModuleRecord
    chunks: list[bytes]
    rows: tuple[Tensor, Tensor]
    places: Sequence[int]


def encode_module(
    shape: ModuleRecord, down: Tensor, up: Tensor, choice: ModulePlan, settings: QuantizationSettings, *, predict: bool = False
) -> Coded:
    """Quantize components and pack them.

    Args:
        shape: a record with the module's name, sizes and kept channels.
        down: (rank, kept inputs * kernel), rows of the balanced basis, strongest first.
        up: (rank, kept outputs).
        choice: what was decided for it.
        settings: of the quantization.
        predict: estimate the size only: nothing is refined, and zeros stand for the coded bytes.
    """
    if choice.step is not None:
        layering = _layering(down.numel() + up.numel(), choice.planes) if settings.progressive else SINGLE
        with np.errstate(over="ignore"):  # weights too large for the step size are refused by the coder
            if predict:
                coded = predict_entropy(down, up, choice.step, layering=layering)
            else:
                coded = encode_entropy(down, up, choice.step, layering=layering, refine=settings.refine)
        parameters: dict[str, object] = {"step": choice.step, "layers": layering.layers}
        if layering.layers > 1:
            parameters |= {"per_plane": layering.per_plane, "phase": choice.phase}
        return Coded(replace(shape, rank=coded.rank, codec="entropy", parameters=parameters), coded.chunks, coded.rows, coded.kept)
    form = FixedFormat.of_settings(settings)
    parameters = {"block": form.block_size or 0, "scales": _SCALES[form.scale_dtype]}
    if choice.bits is not None:
        parameters["bits"] = _runs(choice.bits)
    entry = replace(shape, rank=len(down), codec=form.codec, parameters=parameters)
    chunks = [encode_fixed(down, up, form, choice.bits)]
    return Coded(entry, chunks, decode_rows(entry, chunks), range(len(down)))


def _layering(weights: int, planes: int) -> Layering:
    per_plane = next(number for least, number in reversed(_STAGES_PER_PLANE.items()) if weights >= least)
    return Layering(planes * per_plane, per_plane)


def decode_module(entry: ModuleRecord, chunks: Sequence[bytes], dtype: torch.dtype = torch.float32) -> LowRankUpdate:
    """Decode a module.

    Args:
        entry: its record in the index. Its parameter `scale` is alpha / rank of the result, 1 where it has none.
        chunks: the stages of its payload, those that are there.
        dtype: of the factors.

    Returns:
        The update, of the rank that `decoded_rank` says.

    Raises:
        FormatError: the bytes are not what the entry says, a codec that this program does not know, or a weight beyond `dtype`.
    """
    down, up = spread_channels(entry, *(_at_least_one(rows) for rows in decode_rows(entry, chunks, dtype)))
    scale = entry.parameters.get("scale", 1.0)
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise FormatError(f"scale {scale!r} is no number: the file is damaged")
    return LowRankUpdate.from_matrices(down, up.T.contiguous(), len(down) * float(scale), entry.kernel)


def decoded_rank(entry: ModuleRecord, chunks: Sequence[bytes]) -> int:
    """Return the rank of the decoded update: the components that the given stages describe, and at least one.

    Raises:
        FormatError: as `decode_module`.
    """
    if entry.codec != "entropy":
        return entry.rank
    return max(components_told(chunks, entry.rank, _layering_of(entry)), 1)


def _at_least_one(rows: Tensor) -> Tensor:
    return rows if len(rows) else rows.new_zeros(1, rows.shape[1])


def decode_rows(entry: ModuleRecord, chunks: Sequence[bytes], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Decode the rows of the stored factors: down (p, kept inputs * kernel) and up^T (p, kept outputs), of the p components there.

    Raises:
        FormatError: as `decode_module`.
    """
    inputs, outputs = entry.stored
    parameters = entry.parameters
    try:
        if entry.codec == "entropy":
            step, layering = float(_number(parameters["step"], float)), _layering_of(entry)
            with np.errstate(over="ignore"):
                down, up = decode_entropy(chunks, entry.rank, inputs, outputs, step, layering, dtype)
            if not all(math.isfinite(edge) for row in (down, up) if row.numel() for edge in torch.aminmax(row)):
                raise FormatError(f"step {step} makes weights beyond {dtype}: the file is damaged, or decode to float32")
            return down, up
        block = int(_number(parameters["block"]))
        form = FixedFormat(entry.codec, block or None, scale_dtype=_DTYPES[parameters["scales"]])
        if len(chunks) != 1:
            raise FormatError(f"{len(chunks)} layers, {entry.codec} has one: the file is damaged")
        bits = _unroll(parameters["bits"], entry.rank) if entry.codec == MIXED else None
        return decode_fixed(chunks[0], entry.rank, inputs, outputs, form, bits, dtype)
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _unfit(entry, error) from None


def stage_place(entry: ModuleRecord, stage: int) -> float:
    """Return a number that sorts the stages of all modules in the payload: the steepest fall of the error per bit comes first."""
    if stage_count(entry) == 1:
        return -math.inf
    return -_layering_of(entry).slope(stage) - int(_number(entry.parameters.get("phase", 0))) / 4


def stage_count(entry: ModuleRecord) -> int:
    """Return how many stages a whole payload of the module has.

    Raises:
        FormatError: the index has no number there.
    """
    layers = entry.parameters.get("layers", 1)
    if type(layers) is not int:
        raise FormatError(f"{entry.name}: {layers!r} layers: the file is damaged")
    return layers


def _layering_of(entry: ModuleRecord) -> Layering:
    try:
        layers = int(_number(entry.parameters["layers"]))
        return SINGLE if layers == 1 else Layering(layers, int(_number(entry.parameters["per_plane"])))
    except (KeyError, ValueError) as error:
        raise _unfit(entry, error) from None


def _unfit(entry: ModuleRecord, error: Exception) -> FormatError:
    return FormatError(f"parameters {dict(entry.parameters)} do not fit codec {entry.codec} ({error})")


def _number(value: Any, kind: type = int) -> float:
    """Return a number from the parameters of a codec. Text that could be read as a number is not accepted."""
    if type(value) not in (int, kind) or (kind is int and not 0 <= value < _LARGEST):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def spread_channels(entry: ModuleRecord, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Put the kept channels back to their places, zeros between: down (..., rank, in * kernel), up^T (..., rank, out)."""
    kept_out, kept_in = entry.kept
    if kept_out is not None:
        up = _spread(up.unsqueeze(-1), kept_out, entry.outputs)
    if kept_in is not None:
        down = _spread(down.unflatten(-1, (len(kept_in), -1)), kept_in, entry.inputs)
    return down, up


def take_channels(entry: ModuleRecord, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `spread_channels`: return the kept channels alone."""
    kept_out, kept_in = entry.kept
    if kept_out is not None:
        up = up[..., list(kept_out)]
    if kept_in is not None:
        down = down.unflatten(-1, (entry.inputs, -1))[..., list(kept_in), :].flatten(-2)
    return down, up


def _spread(rows: Tensor, kept: tuple[int, ...], count: int) -> Tensor:
    whole = rows.new_zeros(*rows.shape[:-2], count, rows.shape[-1])
    whole[..., list(kept), :] = rows
    return whole.flatten(-2)


def _runs(bits: Sequence[int]) -> list[list[int]]:
    """Write bits as runs of (bits, count): [6, 6, 4] becomes [[6, 2], [4, 1]]."""
    runs: list[list[int]] = []
    for value in bits:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def _unroll(runs: Sequence[Sequence[int]], rank: int) -> list[int]:
    if any(type(number) is not int or number < 1 for run in runs for number in run) or sum(count for _, count in runs) != rank:
        raise FormatError(f"bits {runs} are not those of {rank} components: the file is damaged")
    return [bits for bits, count in runs for _ in range(count)]
