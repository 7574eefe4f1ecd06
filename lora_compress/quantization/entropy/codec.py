"""The entropy codec of one module: one step size for all components, integers coded at their probability, in one stage or more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import FormatError, SettingsError
from .integers import QuantizedModule, quantize_module, restore_module, row_units
from .numba_reader import kernels_for, open_reader
from .progressive import read_progressive, read_progressive_side, write_progressive
from .reconstruction import Model, row_weights
from .refine import refine_module
from .single import read_single, read_single_side, write_single
from .stages import SINGLE, Stages, start_stages

__all__ = ["EntropyCoded", "components_told", "decode_entropy", "encode_entropy", "encode_integers", "predict_entropy"]

_MOST_STAGES = 64
_SLOWER = 4  # times that of one stage, about, is what many stages take without compiled loops
_WEIGHTS_PER_BYTE = 2**20  # an encoder stays far below; a payload that promises more is not decoded


@dataclass(frozen=True)
class EntropyCoded:
    """A module's payload.

    Args:
        chunks: one for each stage; the first c of them decode to a smaller LoRA.
        rank: components that are stored; those that round to zero are not.
        kept: (rank,), which components of the input these are.
        rows: what the whole payload decodes to, down (rank, n) and up (rank, m).
    """

    chunks: list[bytes]
    rank: int
    kept: tuple[int, ...]
    rows: tuple[Tensor, Tensor]


def encode_entropy(down: Tensor, up: Tensor, step_size: float, *, stages: Stages = SINGLE, refine: bool = True) -> EntropyCoded:
    """Code a module: q = round(row 2^(e/8) / step size) with 2^(e/4) = sigma to the next quarter octave, entropy coded.

    Multiplying the balanced rows by sqrt(sigma) makes one step size the best for all components (reverse water-filling).

    Args:
        down: (k, n), rows sqrt(sigma_i) v_i.
        up: (k, m), rows sqrt(sigma_i) u_i.
        step_size: of the quantizer of sigma_i v_i and sigma_i u_i.
        stages: of the payload, a chunk for each.
        refine: refit each factor to the other as coded, where that lowers the error at equal size.

    Raises:
        SettingsError: step size or stages out of range, or the step size so small that a value exceeds 2^28.
        FormatError: a factor holds NaN or infinity.
    """
    _check_stages(stages)
    module = refine_module(down, up, step_size) if refine else quantize_module(down, up, step_size)
    if stages.number == 1:
        return encode_integers(module, step_size)
    module, starts = _by_start(module, stages)
    return _encoded(module, step_size, write_progressive(module, starts, stages))


def encode_integers(module: QuantizedModule, step_size: float) -> EntropyCoded:
    """Code integers as they are, with the models that they come with, in one stage: those that a training ended with."""
    return _encoded(module, step_size, [write_single(module)])


def predict_entropy(down: Tensor, up: Tensor, step_size: float, *, stages: Stages = SINGLE) -> EntropyCoded:
    """Return what `encode_entropy` makes without refinement, but for the bytes: zeros stand for them, their number close to it."""
    _check_stages(stages)
    module = quantize_module(down, up, step_size)
    if stages.number > 1:
        module, _ = _by_start(module, stages)
    size = math.ceil(module.payload_bits / 8)
    count = stages.number
    return _encoded(module, step_size, [bytes(size // count + (stage < size % count)) for stage in range(count)])


def decode_entropy(
    chunks: Sequence[bytes],
    rank: int,
    inputs: int,
    outputs: int,
    step_size: float,
    stages: Stages = SINGLE,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return balanced rows down (p, inputs) and up (p, outputs) of the p components that start in the first chunks of a payload.

    They are float32, rounded to `dtype`; what lies beyond that becomes infinite. With all chunks p is `rank`.

    Args:
        chunks: one for each of the first stages.
        rank: components of the whole payload.
        inputs: weights of a row of down.
        outputs: weights of a row of up.
        step_size: as the encoder had it.
        stages: of the whole payload.
        dtype: of the rows.

    Raises:
        FormatError: the chunks cannot be those of such a module.
    """
    _check_declared(chunks, rank, inputs, outputs, step_size, stages)
    kernels = kernels_for(rank * (inputs + outputs) * (1 if stages.number == 1 else _SLOWER))
    readers = [open_reader(chunk, kernels) for chunk in chunks]
    if not readers:
        return torch.zeros(0, inputs, dtype=dtype), torch.zeros(0, outputs, dtype=dtype)
    if stages.number == 1:
        side, known, begins = read_single(readers[0], rank, inputs, outputs)
    else:
        side, known, begins = read_progressive(readers, chunks, rank, inputs, outputs, stages)
    if not len(side.gains):
        return torch.zeros(0, inputs, dtype=dtype), torch.zeros(0, outputs, dtype=dtype)
    plane = stages.plane(len(chunks) - 1)
    models = [Model(*row, plane) for row in zip(side.scales.ravel().tolist(), side.shapes.ravel().tolist(), strict=True)]
    widths = np.repeat([inputs, outputs], len(side.gains))
    kind = np.float16 if dtype == torch.float16 else np.float32  # of numpy, which has no other
    units = np.tile(row_units(side.gains, step_size), 2)
    look_up = kernels.look_up if kernels else None
    weights = torch.from_numpy(row_weights(known, begins, widths, models, units, kind, look_up)).to(dtype)
    edge = len(side.gains) * inputs
    return weights[:edge].view(-1, inputs), weights[edge:].view(-1, outputs)


def components_told(chunks: Sequence[bytes], rank: int, stages: Stages) -> int:
    """Return the number of rows that `decode_entropy` makes of each factor.

    Raises:
        FormatError: as there.
    """
    _check_declared(chunks, rank, 0, 0, 1.0, stages)
    readers = [open_reader(chunk, None) for chunk in chunks]
    if not readers:
        return 0
    side = read_single_side(readers[0], rank) if stages.number == 1 else read_progressive_side(readers, rank, stages)[0]
    return len(side.gains)


def _encoded(module: QuantizedModule, step_size: float, chunks: list[bytes]) -> EntropyCoded:
    down, up = restore_module(module, step_size)
    return EntropyCoded(chunks, module.rank, tuple(module.kept.tolist()), (torch.from_numpy(down), torch.from_numpy(up)))


def _by_start(module: QuantizedModule, stages: Stages) -> tuple[QuantizedModule, np.ndarray]:
    """A module with its components sorted by the stages in which they start, and these, (rank,)."""
    starts = start_stages(module, stages)
    if not starts.any():
        return module, starts
    order = np.argsort(starts, kind="stable")
    return module.taken(order), starts[order]


def _is_possible(stages: Stages) -> bool:
    return all(1 <= number <= _MOST_STAGES for number in stages)


def _check_stages(stages: Stages) -> None:
    if not _is_possible(stages):
        raise SettingsError([f"{stages}: 1 to {_MOST_STAGES} stages are possible, and for each plane"])


def _check_declared(chunks: Sequence[bytes], rank: int, inputs: int, outputs: int, step_size: float, stages: Stages) -> None:
    if not _is_possible(stages) or len(chunks) > stages.number:
        raise FormatError(f"an entropy-coded module has {len(chunks)} chunks for {stages}: 1 to {_MOST_STAGES} are possible")
    if not (step_size > 0 and np.isfinite(step_size)):
        raise FormatError(f"an entropy-coded module has step {step_size}: a positive number is needed")
    if min(rank, inputs, outputs) < 0:
        raise FormatError(f"an entropy-coded module has rank {rank}, {inputs} inputs and {outputs} outputs: none can be negative")
    size = sum(map(len, chunks))
    if size and rank * (inputs + outputs) > _WEIGHTS_PER_BYTE * size:
        raise FormatError(
            f"an entropy-coded module of {rank} x ({inputs} + {outputs}) weights has {size} bytes, too few to be true"
        )
