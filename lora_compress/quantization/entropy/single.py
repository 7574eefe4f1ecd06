"""Payloads of one stage: all components, then all values."""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from .ans import AnsReader, AnsWriter
from .integers import QuantizedModule
from .numba_reader import CompiledReader
from .side_information import Side, SideReader, write_side
from .values import read_whole, row_runs, run_places, whole_passes, write_whole

__all__ = ["read_single", "read_single_side", "write_single"]


def write_single(module: QuantizedModule) -> bytes:
    """Return the payload of a module, b"" for one of no components."""
    if not module.rank:
        return b""
    writer = AnsWriter()
    write_side(writer, module, 0, module.rank)
    rows = [*module.values[0], *module.values[1]]
    for run in row_runs(np.stack(module.scales), np.stack(module.shapes)):
        write_whole(writer, np.concatenate([rows[row] for row in run.rows]), whole_passes(run.scale, run.shape))
    return writer.to_bytes()


def read_single_side(reader: AnsReader, rank: int) -> Side:
    """Return what a payload says of its components.

    Raises:
        FormatError: no writer codes that.
    """
    found = SideReader()
    found.read(reader, rank)
    return found.side()


def read_single(reader: AnsReader, rank: int, inputs: int, outputs: int) -> tuple[Side, np.ndarray, np.ndarray]:
    """Return the components of a payload, the symbols of all rows, int32, and where each row (2 rank,) begins among them.

    Raises:
        FormatError: the payload is damaged.
    """
    side = read_single_side(reader, rank)
    widths = np.repeat([inputs, outputs], rank)
    known, begins = np.zeros(widths.sum(), dtype=np.int32), np.zeros(0, dtype=np.int64)
    if rank:
        runs = row_runs(side.scales, side.shapes)
        places, begins = run_places(runs, widths)
        turns = [(place, (run.scale, run.shape)) for place, run in zip(places, runs, strict=True)]
        if isinstance(reader, CompiledReader):
            reader.read_runs(known, whole_passes, turns)
        else:
            for place, model in turns:
                read_whole(reader, known[place], whole_passes(*model))
    if reader.finish():
        raise FormatError("an entropy-coded payload does not match its checks: get the file again")
    return side, known, begins
