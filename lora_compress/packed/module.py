"""Coding one module: its components become the bytes of a packed file, and back.

The bytes of a module are one chunk, or several *stages* of a progressive payload, each of which refines the ones before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import FormatError
from ..quantization import DECODERS, ModulePlan, StoredModule, decoder_named
from ..settings import QuantizationSettings
from ..update import LowRankUpdate
from .index import ModuleRecord

__all__ = [
    "Coded",
    "decode_module",
    "decode_rows",
    "decoded_rank",
    "encode_module",
    "spread_channels",
    "stage_count",
    "stage_place",
    "take_channels",
]


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
    coded = settings.method.encode(down, up, choice, settings, predict=predict)
    entry = replace(shape, rank=coded.rank, codec=coded.codec, parameters=coded.parameters)
    return Coded(entry, coded.chunks, coded.rows, coded.places)


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
    if entry.codec not in DECODERS:
        return entry.rank
    with _fitting(entry):
        return decoder_named(entry.codec).decoded_rank(_stored(entry), chunks)


def _at_least_one(rows: Tensor) -> Tensor:
    return rows if len(rows) else rows.new_zeros(1, rows.shape[1])


def decode_rows(entry: ModuleRecord, chunks: Sequence[bytes], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Decode the rows of the stored factors: down (p, kept inputs * kernel) and up^T (p, kept outputs), of the p components there.

    Raises:
        FormatError: as `decode_module`.
    """
    decoder = decoder_named(entry.codec)
    with _fitting(entry):
        return decoder.decode(_stored(entry), chunks, dtype)


def stage_place(entry: ModuleRecord, stage: int) -> float:
    """Return where a stage belongs among those of all modules: the steepest fall of the error comes first."""
    if stage_count(entry) == 1 or entry.codec not in DECODERS:
        return -math.inf
    with _fitting(entry):
        return -decoder_named(entry.codec).stage_slope(_stored(entry), stage)


def stage_count(entry: ModuleRecord) -> int:
    """Return the number of stages that a whole payload of the module has, the parameter `layers`.

    Raises:
        FormatError: the index does not have a number there.
    """
    stages = entry.parameters.get("layers", 1)
    if type(stages) is not int:
        raise FormatError(f"{entry.name}: {stages!r} layers: the file is damaged")
    return stages


def _stored(entry: ModuleRecord) -> StoredModule:
    return StoredModule(entry.codec, entry.rank, *entry.stored, entry.parameters)


@contextmanager
def _fitting(entry: ModuleRecord) -> Iterator[None]:
    """Turn the errors of a `Decoder` into a FormatError."""
    try:
        yield
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"parameters {dict(entry.parameters)} do not fit codec {entry.codec} ({error})") from None


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
