"""The entropy codec of one module: one step for all components, symbols coded at their probability, layers that refine."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ...errors import FormatError, SettingsError
from .ans import CHECK_BITS, AnsReader, AnsWriter
from .integers import QuantizedModule, quantize_module, restore_module, row_units
from .numba_reader import CompiledReader, compiled_kernels
from .passes import read_steps, write_steps
from .reconstruction import Model, row_weights
from .refine import refine_module
from .side_information import read_side, write_side
from .stages import Layering, Run, row_runs
from .starts import start_layers
from .steps import Passes, plan_steps

__all__ = ["SINGLE", "EntropyCoded", "components_told", "decode_entropy", "encode_entropy", "encode_integers", "predict_entropy"]

_MOST_LAYERS = 64
_SMALL = 256  # bytes of a chunk
SINGLE = Layering()
_short_calls = Lock()  # threads that fight for the interpreter in hundreds of short calls take longer than one that has it alone
_SLOWER = 4  # times that of one layer, about, is what many layers take without compiled loops
_WORTH_COMPILING = 1 << 22  # weights of one layer that a process decodes before it takes the time to load a compiler
_decoded = 0  # weights in this process, closely: threads may lose some
_WEIGHTS_PER_BYTE = 2**20  # an encoder stays far below; a payload that promises more is not decoded


@dataclass(frozen=True)
class EntropyCoded:
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


def encode_entropy(down: Tensor, up: Tensor, step: float, *, layering: Layering = SINGLE, refine: bool = True) -> EntropyCoded:
    """Code a module: q = round(row 2^(e/8) / step) with 2^(e/4) = sigma to the next quarter octave, entropy coded.

    Multiplying the balanced rows by sqrt(sigma) makes one step the best for all components (reverse water-filling).

    Args:
        down: (k, n), rows sqrt(sigma_i) v_i.
        up: (k, m), rows sqrt(sigma_i) u_i.
        step: quantization step of sigma_i v_i and sigma_i u_i.
        layering: of the payload, a chunk for each layer.
        refine: refit each factor to the other as coded, where that lowers the error at equal size.

    Raises:
        SettingsError: step or layers out of range, or the step so small that a value exceeds 2^28.
        FormatError: a factor holds NaN or infinity.
    """
    _check_layering(layering)
    module = refine_module(down, up, step) if refine else quantize_module(down, up, step)
    module, starts = _by_start(module, layering)
    return _encoded(module, step, _chunks(module, starts, layering))


def encode_integers(module: QuantizedModule, step: float) -> EntropyCoded:
    """Code integers as they are, with the models that they come with, in one layer: those that a training ended with."""
    return _encoded(module, step, _chunks(*_by_start(module, SINGLE), SINGLE))


def predict_entropy(down: Tensor, up: Tensor, step: float, *, layering: Layering = SINGLE) -> EntropyCoded:
    """What `encode_entropy` makes without refinement, but for the bytes: of their number, known to a few, there are zeros."""
    _check_layering(layering)
    module, _ = _by_start(quantize_module(down, up, step), layering)
    size = math.ceil(module.payload_bits / 8)
    layers = layering.layers
    return _encoded(module, step, [bytes(size // layers + (layer < size % layers)) for layer in range(layers)])


def decode_entropy(
    chunks: Sequence[bytes],
    rank: int,
    inputs: int,
    outputs: int,
    step: float,
    layering: Layering = SINGLE,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Balanced rows down (p, inputs) and up (p, outputs) of the p components that the first chunks of a payload tell of.

    They are float32, rounded to `dtype`; what lies beyond that becomes infinite. With all chunks p is `rank`.

    Raises:
        FormatError: the chunks cannot be those of such a module.
    """
    _check_declared(chunks, rank, inputs, outputs, step, layering)
    kernels = _kernels(rank * (inputs + outputs) * (1 if layering.layers == 1 else _SLOWER))
    readers = [_reader(chunk, kernels) for chunk in chunks]
    side = read_side(readers, rank, layering)
    if not len(side.gains):
        _check_ends(readers, chunks, layering)
        return torch.zeros(0, inputs, dtype=dtype), torch.zeros(0, outputs, dtype=dtype)
    runs = row_runs(side.scales, side.shapes, side.starts)
    widths = np.repeat([inputs, outputs], len(side.gains))
    places, begins = _places(runs, widths)
    known = np.zeros(widths.sum(), dtype=np.int32)
    with nullcontext() if kernels or layering.layers == 1 else _short_calls:
        for layer, reader in enumerate(readers):
            _read_layer(reader, known, ((places[number], passes) for number, passes in _turns(runs, layering, layer)))
    _check_ends(readers, chunks, layering)
    plane = layering.plane(len(chunks) - 1)
    models = [Model(*row, plane) for row in zip(side.scales.ravel().tolist(), side.shapes.ravel().tolist(), strict=True)]
    kind = np.float16 if dtype == torch.float16 else np.float32  # of numpy, which has no other
    units = np.tile(row_units(side.gains, step), 2)
    look_up = kernels.look_up if kernels else None
    weights = torch.from_numpy(row_weights(known, begins, widths, models, units, kind, look_up)).to(dtype)
    edge = len(side.gains) * inputs
    return weights[:edge].view(-1, inputs), weights[edge:].view(-1, outputs)


def components_told(chunks: Sequence[bytes], rank: int, layering: Layering) -> int:
    """Rows that `decode_entropy` makes of each factor.

    Raises:
        FormatError: as there.
    """
    _check_declared(chunks, rank, 0, 0, 1.0, layering)
    return len(read_side([_reader(chunk, None) for chunk in chunks], rank, layering).gains)


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


def _check_ends(readers: Sequence[AnsReader], chunks: Sequence[bytes], layering: Layering) -> None:
    """Each layer ends with the check of those that follow; where they were cut off, with any."""
    for number, reader in enumerate(readers, start=1):
        end, following = reader.finish(), chunks[number:]
        known = len(chunks) == layering.layers or any(following) or not chunks[number - 1]
        if known and end != (_check(following) if chunks[number - 1] else 0):
            raise FormatError("an entropy-coded payload does not match its checks: get the file again")


def _check(chunks: Sequence[bytes]) -> int:
    """Of the first of some chunks that is not empty; 0 without one. That of a small one is shorter: it would be a share of it."""
    chunk = next(filter(None, chunks), b"")
    return zlib.crc32(chunk) & (1 << (CHECK_BITS if len(chunk) >= _SMALL else CHECK_BITS // 2)) - 1


def _encoded(module: QuantizedModule, step: float, chunks: list[bytes]) -> EntropyCoded:
    down, up = restore_module(module, step)
    return EntropyCoded(chunks, module.rank, tuple(module.kept.tolist()), (torch.from_numpy(down), torch.from_numpy(up)))


def _by_start(module: QuantizedModule, layering: Layering) -> tuple[QuantizedModule, np.ndarray]:
    """A module with its components sorted by the layers in which they start, and these, (rank,)."""
    starts = start_layers(module, layering)
    if not starts.any():
        return module, starts
    order = np.argsort(starts, kind="stable")
    return module.taken(order), starts[order]


def _chunks(module: QuantizedModule, starts: np.ndarray, layering: Layering) -> list[bytes]:
    if not module.rank:
        return [b""] * layering.layers
    writers = [AnsWriter() for _ in range(layering.layers)]
    write_side(writers, module, starts)
    runs = row_runs(np.stack(module.scales), np.stack(module.shapes), starts)
    rows = [*module.values[0], *module.values[1]]
    values = [np.concatenate([rows[row] for row in run.rows]) for run in runs]
    for layer, writer in enumerate(writers):
        for number, passes in _turns(runs, layering, layer):
            write_steps(writer, values[number], plan_steps(passes))
    chunks: list[bytes] = []
    for writer in reversed(writers):
        chunks.insert(0, writer.to_bytes(_check(chunks)))
    return chunks


def _turns(runs: Sequence[Run], layering: Layering, layer: int) -> Iterator[tuple[int, Passes]]:
    """Runs that a layer tells of, by number, and the passes that it makes over them."""
    before, after = layering.plane(layer - 1), layering.plane(layer)
    for number, run in enumerate(runs):
        if run.start == layer:
            yield number, Passes(run.scale, run.shape, None, after)
        elif run.start < layer and before != after:
            yield number, Passes(run.scale, run.shape, before, after)


def _is_possible(layering: Layering) -> bool:
    return all(1 <= number <= _MOST_LAYERS for number in layering)


def _check_layering(layering: Layering) -> None:
    if not _is_possible(layering):
        raise SettingsError([f"{layering}: 1 to {_MOST_LAYERS} layers are possible, and for each plane"])


def _check_declared(chunks: Sequence[bytes], rank: int, inputs: int, outputs: int, step: float, layering: Layering) -> None:
    if not _is_possible(layering) or len(chunks) > layering.layers:
        raise FormatError(f"an entropy-coded module has {len(chunks)} chunks for {layering}: 1 to {_MOST_LAYERS} are possible")
    if not (step > 0 and np.isfinite(step)):
        raise FormatError(f"an entropy-coded module has step {step}: a positive number is needed")
    if min(rank, inputs, outputs) < 0:
        raise FormatError(f"an entropy-coded module has rank {rank}, {inputs} inputs and {outputs} outputs: none can be negative")
    size = sum(map(len, chunks))
    if size and rank * (inputs + outputs) > _WEIGHTS_PER_BYTE * size:
        raise FormatError(
            f"an entropy-coded module of {rank} x ({inputs} + {outputs}) weights has {size} bytes, too few to be true"
        )
