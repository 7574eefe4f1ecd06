"""Payloads of several stages: each adds a bit plane of all rows that have started, or rows that start in it; see `stages`."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from threading import Lock

import numpy as np

from ...errors import FormatError
from .ans import CHECK_BITS, AnsReader, AnsWriter
from .integers import QuantizedModule
from .numba_reader import CompiledReader
from .planes import PlaneRange, plan_passes, read_passes, write_passes
from .side_information import Side, SideReader, write_side
from .stages import Stages, least_scale
from .symbols import read_symbols, symbol_table, write_symbols
from .values import Run, row_runs, run_places

__all__ = ["read_progressive", "read_progressive_side", "write_progressive"]

_COUNTS = symbol_table(33, 0)  # of components that start in a stage: half of the time 0, 1 or 2
_SMALL = 256  # bytes of a chunk
_short_calls = Lock()  # threads that fight for the interpreter in hundreds of short calls take longer than one that has it alone


def write_progressive(module: QuantizedModule, starts: np.ndarray, stages: Stages) -> list[bytes]:
    """Return the stages of a payload.

    Args:
        module: its components are sorted by the stages in which they start.
        starts: (rank,), these stages.
        stages: how many there are.
    """
    if not module.rank:
        return [b""] * stages.number
    writers = [AnsWriter() for _ in range(stages.number)]
    edges = np.searchsorted(starts, np.arange(stages.number + 1)).tolist()
    for writer, (begin, end) in zip(writers, pairwise(edges), strict=True):
        if writer is not writers[-1] and begin < module.rank:  # the last stage has all that are left
            write_symbols(writer, np.array([end - begin]), _COUNTS)
        write_side(writer, module, begin, end)
    runs = row_runs(np.stack(module.scales), np.stack(module.shapes), starts)
    rows = [*module.values[0], *module.values[1]]
    values = [np.concatenate([rows[row] for row in run.rows]) for run in runs]
    for stage, writer in enumerate(writers):
        for number, planes in _turns(runs, stages, stage):
            write_passes(writer, values[number], plan_passes(planes))
    chunks: list[bytes] = []
    for writer in reversed(writers):
        chunks.insert(0, writer.to_bytes(_check(chunks)))
    return chunks


def read_progressive_side(readers: Sequence[AnsReader], rank: int, stages: Stages) -> tuple[Side, np.ndarray]:
    """Return what the first stages say of the components that have started, and the stages (p,) in which these start.

    Raises:
        FormatError: no writer codes that.
    """
    found, starts = SideReader(), list[int]()
    for stage, reader in enumerate(readers):
        left = rank - len(starts)
        count = left if stage == stages.number - 1 or not left else int(read_symbols(reader, 1, _COUNTS)[0])
        if count > left:
            raise FormatError("an entropy-coded payload tells of more components than there are: get the file again")
        found.read(reader, count)
        starts += [stage] * count
    least = np.array([least_scale(stages.plane(stage)) for stage in starts], dtype=np.int64)
    return found.side(least), np.array(starts, dtype=np.int64)


def read_progressive(
    readers: Sequence[AnsReader], chunks: Sequence[bytes], rank: int, inputs: int, outputs: int, stages: Stages
) -> tuple[Side, np.ndarray, np.ndarray]:
    """Return the components that have started in the first stages, the symbols of their rows, and where each row begins.

    The symbols, int32, are signed ones above plane 0; rows are (2 p,).

    Raises:
        FormatError: the payload is damaged.
    """
    side, starts = read_progressive_side(readers, rank, stages)
    widths = np.repeat([inputs, outputs], len(starts))
    known, begins = np.zeros(widths.sum(), dtype=np.int32), np.zeros(0, dtype=np.int64)
    if len(starts):
        runs = row_runs(side.scales, side.shapes, starts)
        places, begins = run_places(runs, widths)
        with nullcontext() if isinstance(readers[0], CompiledReader) else _short_calls:
            for stage, reader in enumerate(readers):
                turns = [(places[number], (planes,)) for number, planes in _turns(runs, stages, stage)]
                if isinstance(reader, CompiledReader):
                    reader.read_runs(known, plan_passes, turns)
                else:
                    for place, (planes,) in turns:
                        read_passes(reader, known[place], plan_passes(planes))
    _check_ends(readers, chunks, stages)
    return side, known, begins


def _check_ends(readers: Sequence[AnsReader], chunks: Sequence[bytes], stages: Stages) -> None:
    """Each stage ends with the check of those that follow; where they were cut off, with any."""
    for number, reader in enumerate(readers, start=1):
        end, following = reader.finish(), chunks[number:]
        known = len(chunks) == stages.number or any(following) or not chunks[number - 1]
        if known and end != (_check(following) if chunks[number - 1] else 0):
            raise FormatError("an entropy-coded payload does not match its checks: get the file again")


def _check(chunks: Sequence[bytes]) -> int:
    """CRC-32 of the first chunk that is not empty, cut to 16 bits, or to 8 for a small chunk, where 2 bytes would be felt."""
    chunk = next(filter(None, chunks), b"")
    return zlib.crc32(chunk) & (1 << (CHECK_BITS if len(chunk) >= _SMALL else CHECK_BITS // 2)) - 1


def _turns(runs: Sequence[Run], stages: Stages, stage: int) -> Iterator[tuple[int, PlaneRange]]:
    """Runs that a stage codes, by number, and between which planes."""
    before, after = stages.plane(stage - 1), stages.plane(stage)
    for number, run in enumerate(runs):
        if run.start == stage:
            yield number, PlaneRange(run.scale, run.shape, None, after)
        elif run.start < stage and before != after:
            yield number, PlaneRange(run.scale, run.shape, before, after)
