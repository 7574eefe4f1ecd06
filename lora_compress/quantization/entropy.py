"""The entropy codec of one module: one step for all components, symbols coded at their probability, layers that refine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError, SettingsError
from .ans import AnsReader, AnsWriter, uniform
from .compiled import CompiledReader, compiled_kernels
from .integers import QuantizedModule, quantize_module, restore_module, row_units
from .models import LARGEST_SCALE
from .passes import as_symbols, as_values, read_steps, read_symbols, write_steps, write_symbols
from .refine import refine_module
from .schedule import Run, row_runs, stages_of
from .steps import Passes, plan_steps, symbol_table
from .tables import MAX_SCALE, SHAPES
from .weights import Model, row_weights

__all__ = ["MAX_LAYERS", "EncodedModule", "decode_entropy", "encode_entropy", "encode_integers", "predict_entropy"]

MAX_LAYERS = 64
_SIDE_MODELS = 256  # numbers of (scale, shape) pairs
_MAX_EXPONENT = 4000  # eighths of an octave; sqrt of what float32 holds, twice over
_short_calls = Lock()  # threads that fight for the interpreter in hundreds of short calls take longer than one that has it alone
_SLOWER = 4  # times that of one layer, about, is what many layers take without compiled loops
_WORTH_COMPILING = 1 << 22  # weights of one layer that a process decodes before it takes the time to load a compiler
_decoded = 0  # weights in this process, closely: threads may lose some
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
    kernels = _kernels(rank * (inputs + outputs) * (1 if layers == 1 else _SLOWER))
    reader = _reader(chunks[0], kernels)
    gains, scales, shapes = _read_side(reader, rank)
    runs = row_runs(scales, shapes, layers)
    widths = np.repeat([inputs, outputs], rank)
    places, begins = _places(runs, widths)
    known = np.zeros(widths.sum(), dtype=np.int32)
    with nullcontext() if kernels or layers == 1 else _short_calls:
        for layer in range(len(chunks)):
            reader = reader if layer == 0 else _reader(chunks[layer], kernels)
            _read_layer(reader, known, ((places[number], passes) for number, passes in _turns(runs, layer)))
    models = [Model(*row) for row in zip(scales.tolist(), shapes.tolist(), stages_of(runs, len(chunks)), strict=True)]
    kind = np.float16 if dtype == torch.float16 else np.float32  # of numpy, which has no other
    units = np.tile(row_units(gains, step), 2)
    look_up = kernels.look_up if kernels else None
    weights = torch.from_numpy(row_weights(known, begins, widths, models, units, kind, look_up)).to(dtype)
    return weights[: rank * inputs].view(rank, inputs), weights[rank * inputs :].view(rank, outputs)


def _places(runs: Sequence[Run], widths: np.ndarray) -> tuple[list[slice], np.ndarray]:
    """Where each run is in the symbols of a module, one run after the other, and where each row, (2 r,), begins there."""
    order = np.concatenate([run.rows for run in runs])
    edges = np.concatenate([[0], np.cumsum(widths[order])])
    begins = np.empty(len(order), dtype=np.int64)
    begins[order] = edges[:-1]
    ends = edges[np.cumsum([0, *(len(run.rows) for run in runs)])].tolist()
    return [slice(*pair) for pair in pairwise(ends)], begins


def _kernels(weights: int) -> ModuleType | None:
    """Compiled loops, if this process has decoded so much that loading them pays; it will decode some more weights."""
    global _decoded
    _decoded += weights
    return compiled_kernels() if _decoded - weights > _WORTH_COMPILING else None


def _reader(chunk: bytes, kernels: ModuleType | None) -> AnsReader:
    try:
        return CompiledReader(chunk) if kernels else AnsReader(chunk)
    except ValueError as error:
        raise FormatError(f"an entropy-coded payload cannot be read: {error}") from error


def _read_layer(reader: AnsReader, known: np.ndarray, turns: Iterable[tuple[slice, Passes]]) -> None:
    """Fill in what a layer tells of some runs: where each is in `known`, and its passes."""
    if isinstance(reader, CompiledReader):
        reader.read_runs(known, turns)
    else:
        for place, passes in turns:
            read_steps(reader, known[place], plan_steps(passes))
    reader.finish()


def _encoded(module: QuantizedModule, step: float, chunks: list[bytes]) -> EncodedModule:
    down, up = restore_module(module, step)
    return EncodedModule(chunks, module.rank, tuple(module.kept.tolist()), (torch.from_numpy(down), torch.from_numpy(up)))


def _chunks(module: QuantizedModule, layers: int) -> list[bytes]:
    if not module.rank:
        return [b""] * layers
    writer = AnsWriter()
    for side, scale, shape in zip(*module.side, strict=True):
        writer.write(np.array([SHAPES * scale + shape]), uniform, _SIDE_MODELS)
        write_symbols(writer, as_symbols(side), symbol_table(scale, shape))
    runs = row_runs(np.concatenate(module.scales), np.concatenate(module.shapes), layers)
    rows = [*module.values[0], *module.values[1]]
    values = [np.concatenate([rows[row] for row in run.rows]) for run in runs]
    chunks = []
    for layer in range(layers):
        for number, passes in _turns(runs, layer):
            write_steps(writer, values[number], plan_steps(passes))
        chunks.append(writer.to_bytes())
        writer = AnsWriter()
    return chunks


def _turns(runs: Sequence[Run], layer: int) -> Iterator[tuple[int, Passes]]:
    """Runs that a layer tells of, by number, and the passes that it makes over them."""
    for number, run in enumerate(runs):
        before, after = run.ends[layer - 1] if layer else 0, run.ends[layer]
        if after > before:
            yield number, Passes(run.scale, run.shape, before, after)


def _read_side(reader: AnsReader, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains (rank,), scales (2 rank,) and shapes (2 rank,)."""
    rows = []
    for count in (rank, 2 * rank + 2, 2 * rank):
        scale, shape = divmod(int(reader.read(1, uniform, _SIDE_MODELS)[0]), SHAPES)
        if not 1 <= scale <= MAX_SCALE:
            raise FormatError(f"an entropy-coded payload names table {scale}, 1 to {MAX_SCALE} exist: get the file again")
        rows.append(as_values(read_symbols(reader, count, symbol_table(scale, shape))).astype(np.int64))
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
