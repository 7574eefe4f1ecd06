"""The compiled reader makes of any bytes what constriction's makes of them, and of any symbols the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
from core.quantization.gaussian_modules import module
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_compress.errors import FormatError
from lora_compress.quantization.entropy import numba_reader
from lora_compress.quantization.entropy.ans import CHECK_BITS, AnsReader, AnsWriter, uniform
from lora_compress.quantization.entropy.codec import decode_entropy, encode_entropy
from lora_compress.quantization.entropy.numba_reader import CompiledReader, compiled_kernels
from lora_compress.quantization.entropy.planes import PlaneRange, plan_passes, read_passes, write_passes
from lora_compress.quantization.entropy.reconstruction import Model, row_weights
from lora_compress.quantization.entropy.stages import Stages
from lora_compress.quantization.entropy.symbols import as_symbols
from lora_compress.quantization.entropy.table_choice import LARGEST_SCALE
from lora_compress.quantization.entropy.tables import SHAPES, base_counts

pytest.importorskip("numba")

_TABLES = [(uniform, 2), (uniform, 256), (base_counts, 3, 0, 0), (base_counts, 30, 2, 0), (base_counts, 40, 1, 2)]


@st.composite
def models(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """A scale, a shape, and the planes down to which values are known after each layer."""
    scale = draw(st.integers(1, LARGEST_SCALE))
    most = (scale - 1) // 8
    return scale, draw(st.integers(0, SHAPES - 1)), sorted(draw(st.sets(st.integers(0, most), min_size=1)), reverse=True)


def places(drawn: list) -> list[slice]:
    """Where each run is."""
    return [slice(*pair) for pair in pairwise(np.cumsum([0, *(count for _, count in drawn)]).tolist())]


def turns(drawn: list) -> Iterator[list[tuple[slice, PlaneRange]]]:
    """Layer by layer, where each run is and the passes over it."""
    for layer in range(max(len(stops) for (_, _, stops), _ in drawn)):
        yield [
            (place, PlaneRange(scale, shape, stops[layer - 1] if layer else None, stops[layer]))
            for ((scale, shape, stops), _), place in zip(drawn, places(drawn), strict=True)
            if layer < len(stops)
        ]


def plain_runs(reader: AnsReader, known: np.ndarray, layer: list[tuple[slice, PlaneRange]]) -> None:
    """As the compiled reader's `read_runs`."""
    for place, passes in layer:
        read_passes(reader, known[place], plan_passes(passes))


def planned(layer: list[tuple[slice, PlaneRange]]) -> list[tuple[slice, tuple[PlaneRange]]]:
    """Where each run is, and what to call plan_passes with."""
    return [(place, (planes,)) for place, planes in layer]


def kernels() -> ModuleType:
    """The compiled loops."""
    found = compiled_kernels()
    assert found is not None
    return found


RUNS = st.lists(st.tuples(models(), st.integers(0, 70)), min_size=1, max_size=4)


@settings(deadline=None)  # the first call compiles
@given(
    st.lists(st.tuples(st.sampled_from(_TABLES), st.integers(0, 60), st.integers(0, 2**32 - 1)), max_size=6),
    st.integers(0, 2**16 - 1),
)
def test_both_read_what_was_written(runs: list[tuple[tuple, int, int]], check: int) -> None:
    writer = AnsWriter()
    written = []
    for (counts_of, *key), count, seed in runs:
        symbols = np.random.default_rng(seed).integers(0, len(counts_of(*key)), count)
        written.append((symbols, counts_of, key))
        writer.write(symbols, counts_of, *key)
    chunk = writer.to_bytes(check)
    for reader in (AnsReader(chunk), CompiledReader(chunk)):
        for symbols, counts_of, key in written:
            found = reader.read(len(symbols), counts_of, *key)
            assert found.dtype == np.int32 and (found == symbols).all()
        assert reader.finish() == (check if chunk else 0)


@settings(deadline=None)  # the first call compiles
@given(RUNS, st.integers(0, 2**32 - 1), st.integers(-4, 8))
def test_both_read_the_passes_that_were_written(drawn: list, seed: int, spread: int) -> None:
    """Values of up to 256 times the scale that their table is for: some are escapes."""
    random = np.random.default_rng(seed)
    exact = np.concatenate([random.standard_t(3, count) * 2.0 ** ((scale - 25) / 8 + spread) for (scale, _, _), count in drawn])
    values = np.clip(np.rint(exact), -(2**28), 2**28).astype(np.int32)
    known = [np.zeros(len(values), dtype=np.int32) for _ in range(2)]
    for layer in turns(drawn):
        writer = AnsWriter()
        for place, passes in layer:
            write_passes(writer, values[place], plan_passes(passes))
        readers = AnsReader(chunk := writer.to_bytes()), CompiledReader(chunk)
        plain_runs(readers[0], known[0], layer)
        readers[1].read_runs(known[1], plan_passes, planned(layer))
        assert (known[0] == known[1]).all()
        assert all(reader.finish() == 0 for reader in readers)
    for (_, _, stops), place in zip([model for model, _ in drawn], places(drawn), strict=True):
        if not stops[-1]:
            assert (known[1][place] == as_symbols(values[place])).all()


@settings(deadline=None)  # the first call compiles
@given(RUNS, st.data())
def test_both_make_the_same_of_any_bytes(drawn: list, data: st.DataObject) -> None:
    known = [np.zeros(sum(count for _, count in drawn), dtype=np.int32) for _ in range(2)]
    for layer in turns(drawn):
        chunk = data.draw(st.binary(max_size=60)).rstrip(b"\0")
        one, other = AnsReader(chunk), CompiledReader(chunk)
        try:
            plain_runs(one, known[0], layer)
        except FormatError as error:
            with pytest.raises(FormatError, match=str(error)):
                other.read_runs(known[1], plan_passes, planned(layer))
            return
        other.read_runs(known[1], plan_passes, planned(layer))
        assert (known[0] == known[1]).all()
        assert one.left() == other.left() or min(one.left(), other.left()) >> CHECK_BITS


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float16, np.float32]), st.integers(1, 4000))
def test_both_look_the_same_weights_up(seed: int, dtype: type, largest: int) -> None:
    random = np.random.default_rng(seed)
    widths = random.integers(0, 50, 6)
    begins = widths.sum() - np.cumsum(widths)  # rows stand in the opposite order of their symbols
    planes = [0, 1, 2, 3, 4, 0]
    rows = [random.integers(0, 2 * largest + 1, width).astype(np.int32) for width in widths]
    symbols = np.concatenate(rows[::-1])
    described = [Model(int(random.integers(25, 60)), int(random.integers(SHAPES)), plane) for plane in planes]
    units = random.uniform(1e-5, 1e-2, 6)
    arguments = (symbols, begins, widths, described, units, dtype)
    found = row_weights(*arguments, kernels().look_up)
    assert found.dtype == dtype and found.tobytes() == row_weights(*arguments).tobytes()


@pytest.mark.parametrize("stages", [Stages(), Stages(9, 3)])
def test_it_takes_over_where_there_is_much_to_read(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode_entropy(*module(8, 320, 640, lambda i: 1 / i), 0.003, stages=stages, refine=False)
    arguments = (encoded.chunks, encoded.rank, 320, 640, 0.003, stages)
    made: list[bytes] = []
    start = CompiledReader.__init__
    monkeypatch.setattr(CompiledReader, "__init__", lambda self, chunk: (start(self, chunk), made.append(chunk))[0])
    monkeypatch.setattr(numba_reader, "_decoded", 0)
    plain = decode_entropy(*arguments)
    assert not made
    monkeypatch.setattr(numba_reader, "_decoded", 1 << 30)
    for rows, found in zip(plain, decode_entropy(*arguments), strict=True):
        assert rows.equal(found)
    assert made == encoded.chunks
    with pytest.raises(FormatError):
        decode_entropy([encoded.chunks[0][:-9] + b"x", *encoded.chunks[1:]], *arguments[1:])
