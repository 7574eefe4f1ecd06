"""One module between its components and the bytes of a packed file."""

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
    "layer_count",
    "layer_place",
    "spread_channels",
    "take_channels",
]


LEAST_PLANES, MOST_PLANES = 6, 16  # of a progressive payload, whose first layer tells all that is worth as much as the highest
_LAYERS_PER_PLANE = {0: 1, 8_000: 2, 40_000: 4}  # by weights: a chunk costs some bytes
_LARGEST = 1 << 31  # of a whole number among the parameters
_SCALES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_DTYPES = {name: dtype for dtype, name in _SCALES.items()}


@dataclass(frozen=True)
class ModulePlan:
    """What was decided for one module.

    Args:
        rank: components to keep, 0 to drop the module.
        bits: per component, falling (strategy mixed).
        step: of the quantizer (strategy entropy).
        phase: of a progressive payload, eighths of octaves by which its step is coarser than that of the file.
        planes: of a progressive payload; layers beyond would make the smallest cuts smaller and all others larger.
        left: components that coding leaves of these, where that is known: a plain file needs room for no more.
    """

    rank: int
    bits: tuple[int, ...] | None = None
    step: float | None = None
    phase: int = 0
    planes: int = LEAST_PLANES
    left: int | None = None

    @property
    def stored(self) -> int:
        """Components that a file gets."""
        return self.rank if self.left is None else self.left


@dataclass(frozen=True)
class Coded:
    """A module as a packed file gets it.

    Args:
        entry: of the index; rank 0 may come out of entropy coding.
        chunks: layers of its payload.
        rows: what they decode to, down (rank, kept inputs * kernel) and up (rank, kept outputs).
        places: of these components among those that were coded.
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
        shape: an entry with the module's name, sizes and kept channels.
        down: (rank, kept inputs * kernel), rows of the balanced basis, strongest first.
        up: (rank, kept outputs).
        choice: what was decided for it.
        settings: the codec.
        predict: whether zeros will do for what the entropy coder would say, refinement left out.
    """
    if choice.step is not None:
        layering = _layering(down.numel() + up.numel(), choice.planes) if settings.progressive else SINGLE
        with np.errstate(over="ignore"):  # what is too large for the step is refused
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
    per_plane = next(number for least, number in reversed(_LAYERS_PER_PLANE.items()) if weights >= least)
    return Layering(planes * per_plane, per_plane)


def decode_module(entry: ModuleRecord, chunks: Sequence[bytes], dtype: torch.dtype = torch.float32) -> LowRankUpdate:
    """The update that an entry and its layers stand for: factors of `dtype`, alpha / rank = the parameter `scale`, 1 without one.

    Its rank is that of `decoded_rank`.

    Raises:
        FormatError: the bytes are not what the entry says, a codec that this program does not know, or a weight beyond `dtype`.
    """
    down, up = spread_channels(entry, *(_at_least_one(rows) for rows in decode_rows(entry, chunks, dtype)))
    scale = entry.parameters.get("scale", 1.0)
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise FormatError(f"scale {scale!r} is no number: the file is damaged")
    return LowRankUpdate.from_matrices(down, up.T.contiguous(), len(down) * float(scale), entry.kernel)


def decoded_rank(entry: ModuleRecord, chunks: Sequence[bytes]) -> int:
    """Components of the update that an entry and its layers stand for: those that they tell of, and at least one.

    Raises:
        FormatError: as `decode_module`.
    """
    if entry.codec != "entropy":
        return entry.rank
    return max(components_told(chunks, entry.rank, _layering_of(entry)), 1)


def _at_least_one(rows: Tensor) -> Tensor:
    return rows if len(rows) else rows.new_zeros(1, rows.shape[1])


def decode_rows(entry: ModuleRecord, chunks: Sequence[bytes], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The stored factors by rows, `dtype`: down (p, kept inputs * kernel), up^T (p, kept outputs), of the p components told of.

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


def layer_place(entry: ModuleRecord, layer: int) -> float:
    """Where a layer belongs among those of all modules, the steepest fall of the error first."""
    if layer_count(entry) == 1:
        return -math.inf
    return -_layering_of(entry).slope(layer) - int(_number(entry.parameters.get("phase", 0))) / 4


def layer_count(entry: ModuleRecord) -> int:
    """Layers that a whole payload of the module has.

    Raises:
        FormatError: the index says no number.
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
    """A parameter of the index; what turns into one, such as text, is none."""
    if type(value) not in (int, kind) or (kind is int and not 0 <= value < _LARGEST):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def spread_channels(entry: ModuleRecord, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Kept channels back to their places, zeros between: down (..., rank, in * kernel), up^T (..., rank, out)."""
    kept_out, kept_in = entry.kept
    if kept_out is not None:
        up = _spread(up.unsqueeze(-1), kept_out, entry.outputs)
    if kept_in is not None:
        down = _spread(down.unflatten(-1, (len(kept_in), -1)), kept_in, entry.inputs)
    return down, up


def take_channels(entry: ModuleRecord, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """What `spread_channels` put there: the kept channels alone."""
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
    """[6, 6, 4] as [[6, 2], [4, 1]]."""
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
