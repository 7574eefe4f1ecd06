"""The entropy codec of one module: one step for all components, symbols coded at their probability, layers that refine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError, SettingsError
from .ans import AnsReader, AnsWriter, uniform
from .integers import QuantizedModule, quantize_module, restore_module, row_units
from .models import LARGEST_SCALE
from .passes import as_symbols, as_values, at_plane, read_passes, read_symbols, reconstruct, write_passes, write_symbols
from .refine import refine_module
from .schedule import Run, Stage, row_runs, stage_at
from .tables import MAX_SCALE, SHAPES

__all__ = ["MAX_LAYERS", "EncodedModule", "decode_entropy", "encode_entropy", "encode_integers", "predict_entropy"]

MAX_LAYERS = 64
_SIDE_MODELS = 256  # numbers of (scale, shape) pairs
_MAX_EXPONENT = 4000  # eighths of an octave; sqrt of what float32 holds, twice over
_short_calls = Lock()  # threads that fight for the interpreter in hundreds of short calls take longer than one that has it alone
_WEIGHTS_PER_BYTE = 2**20  # an encoder stays far below; a payload that promises more is not decoded


@dataclass(frozen=True)
class EncodedModule:
    """A module's payload.

    Args:
        chunks: one for each layer; the first c of them decode to a smaller LoRA.
        rank: components that are stored; those that round to zero are not.
        kept: (rank,), which components of the input these are.
        rows: what the whole payload decodes to, down (rank, n) and up (rank, m).
    """

    chunks: list[bytes]
    rank: int
    kept: tuple[int, ...]
    rows: tuple[Tensor, Tensor]


def encode_entropy(down: Tensor, up: Tensor, step: float, *, layers: int = 1, refine: bool = True) -> EncodedModule:
    """Code a module: q = round(row 2^(e/8) / step) with 2^(e/4) = sigma to the next quarter octave, entropy coded.

    Multiplying the balanced rows by sqrt(sigma) makes one step the best for all components (reverse water-filling).

    Args:
        down: (k, n), rows sqrt(sigma_i) v_i.
        up: (k, m), rows sqrt(sigma_i) u_i.
        step: quantization step of sigma_i v_i and sigma_i u_i.
        layers: number of chunks; each holds what lowers the error half as steeply per bit as the one before.
        refine: refit each factor to the other as coded, where that lowers the error at equal size.

    Raises:
        SettingsError: step or layers out of range, or the step so small that a value exceeds 2^28.
        FormatError: a factor holds NaN or infinity.
    """
    _check_layers(layers)
    module = refine_module(down, up, step) if refine else quantize_module(down, up, step)
    return _encoded(module, step, _chunks(module, layers))


def encode_integers(module: QuantizedModule, step: float) -> EncodedModule:
    """Code integers as they are, with the models that they come with, in one layer: those that a training ended with."""
    return _encoded(module, step, _chunks(module, 1))


def predict_entropy(down: Tensor, up: Tensor, step: float, *, layers: int = 1) -> EncodedModule:
    """What `encode_entropy` makes without refinement, but for the bytes: of their number, known to a few, there are zeros."""
    _check_layers(layers)
    module = quantize_module(down, up, step)
    size = math.ceil(module.payload_bits / 8)
    return _encoded(module, step, [bytes(size // layers + (layer < size % layers)) for layer in range(layers)])


def decode_entropy(
    chunks: Sequence[bytes],
    rank: int,
    inputs: int,
    outputs: int,
    step: float,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Balanced rows down (rank, inputs) and up (rank, outputs), from the first chunks of a payload of `layers`.

    They are float32, rounded to `dtype`; what lies beyond that becomes infinite. Components that later layers tell of are zero.

    Raises:
        FormatError: the chunks cannot be those of such a module.
    """
    _check_declared(chunks, rank, inputs, outputs, step, layers)
    if not rank or not chunks:
        return torch.zeros(rank, inputs, dtype=dtype), torch.zeros(rank, outputs, dtype=dtype)
    reader = _reader(chunks[0])
    gains, scales, shapes = _read_side(reader, rank)
    runs = row_runs(scales, shapes, layers)
    widths = np.repeat([inputs, outputs], rank)
    known = [np.empty(int(widths[run.rows].sum()), dtype=np.int32) for run in runs]
    with _short_calls if layers > 1 else nullcontext():
        for layer in range(len(chunks)):
            reader = reader if layer == 0 else _reader(chunks[layer])
            for number, run, before, after in _turns(runs, layer):
                known[number] = read_passes(reader, known[number], run.scale, run.shape, before, after)
            reader.finish()
    return _weights(runs, known, scales, shapes, row_units(gains, step), (inputs, outputs), len(chunks), dtype)


def _weights(
    runs: Sequence[Run],
    known: Sequence[np.ndarray],
    scales: np.ndarray,
    shapes: np.ndarray,
    units: np.ndarray,
    widths: tuple[int, int],
    depth: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Rows of both factors from what `depth` layers tell of the runs."""
    rank = len(units)
    symbols = [np.zeros((rank, width), dtype=np.int32) for width in widths]
    stages = [Stage(0)] * (2 * rank)  # a row of which nothing is known is zero at any stage
    for run, line in zip(runs, known, strict=True):
        if position := run.ends[depth - 1]:
            stage = stage_at(run.scale, position)
            found = at_plane(line, stage.plane)
            middle = int(np.searchsorted(run.rows, rank))
            cut = middle * widths[0]
            symbols[0][run.rows[:middle]] = found[:cut].reshape(-1, widths[0])
            symbols[1][run.rows[middle:] - rank] = found[cut:].reshape(-1, widths[1])
            for row in run.rows.tolist():
                stages[row] = stage
    kind = np.float16 if dtype == torch.float16 else np.float32  # of numpy, which has no other
    down, up = (
        torch.from_numpy(reconstruct(part, scales[here].tolist(), shapes[here].tolist(), stages[here], units, kind)).to(dtype)
        for part, here in zip(symbols, (slice(None, rank), slice(rank, None)), strict=True)
    )
    return down, up


def _encoded(module: QuantizedModule, step: float, chunks: list[bytes]) -> EncodedModule:
    down, up = restore_module(module, step)
    return EncodedModule(chunks, module.rank, tuple(module.kept.tolist()), (torch.from_numpy(down), torch.from_numpy(up)))


def _chunks(module: QuantizedModule, layers: int) -> list[bytes]:
    if not module.rank:
        return [b""] * layers
    writer = AnsWriter()
    for side, scale, shape in zip(*module.side, strict=True):
        writer.write(np.array([SHAPES * scale + shape]), uniform, _SIDE_MODELS)
        write_symbols(writer, as_symbols(side), scale, shape)
    runs = row_runs(np.concatenate(module.scales), np.concatenate(module.shapes), layers)
    rows = [*module.values[0], *module.values[1]]
    values = [np.concatenate([rows[row] for row in run.rows]) for run in runs]
    chunks = []
    for layer in range(layers):
        for number, run, before, after in _turns(runs, layer):
            write_passes(writer, values[number], run.scale, run.shape, before, after)
        chunks.append(writer.to_bytes())
        writer = AnsWriter()
    return chunks


def _turns(runs: Sequence[Run], layer: int) -> Iterator[tuple[int, Run, int, int]]:
    """Runs that a layer tells of: number, run, and passes made before and after it."""
    for number, run in enumerate(runs):
        before, after = run.ends[layer - 1] if layer else 0, run.ends[layer]
        if after > before:
            yield number, run, before, after


def _read_side(reader: AnsReader, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains (rank,), scales (2 rank,) and shapes (2 rank,)."""
    rows = []
    for count in (rank, 2 * rank + 2, 2 * rank):
        scale, shape = divmod(int(reader.read(1, uniform, _SIDE_MODELS)[0]), SHAPES)
        if not 1 <= scale <= MAX_SCALE:
            raise FormatError(f"an entropy-coded payload names table {scale}, 1 to {MAX_SCALE} exist: get the file again")
        rows.append(as_values(read_symbols(reader, count, scale, shape)).astype(np.int64))
    gains = np.cumsum(rows[0])
    offsets = rows[1].reshape(2, rank + 1)
    scales = (offsets[:, :1] + offsets[:, 1:] + 2 * gains).ravel()
    shapes = as_symbols(rows[2])
    if np.abs(gains).max() > _MAX_EXPONENT or scales.min() < 1 or scales.max() > LARGEST_SCALE or shapes.max() >= SHAPES:
        raise FormatError("an entropy-coded payload describes rows that cannot be: get the file again")
    return gains, scales, shapes


def _check_layers(layers: int) -> None:
    if not 1 <= layers <= MAX_LAYERS:
        raise SettingsError([f"layers = {layers}: 1 to {MAX_LAYERS} are possible"])


def _check_declared(chunks: Sequence[bytes], rank: int, inputs: int, outputs: int, step: float, layers: int) -> None:
    if not (1 <= layers <= MAX_LAYERS and len(chunks) <= layers):
        raise FormatError(f"an entropy-coded module has {len(chunks)} of {layers} layers: 1 to {MAX_LAYERS} are possible")
    if not (step > 0 and np.isfinite(step)):
        raise FormatError(f"an entropy-coded module has step {step}: a positive number is needed")
    if min(rank, inputs, outputs) < 0:
        raise FormatError(f"an entropy-coded module has rank {rank}, {inputs} inputs and {outputs} outputs: none can be negative")
    if chunks and rank * (inputs + outputs) > _WEIGHTS_PER_BYTE * len(chunks[0]):
        raise FormatError(
            f"an entropy-coded module of {rank} x ({inputs} + {outputs}) weights has {len(chunks[0])} bytes, too few to be true"
        )


def _reader(chunk: bytes) -> AnsReader:
    try:
        return AnsReader(chunk)
    except ValueError as error:
        raise FormatError(f"an entropy-coded payload cannot be read: {error}") from error
