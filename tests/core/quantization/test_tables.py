"""The integer tables: exact sums, the same on every machine, close to the distributions they stand for."""

from __future__ import annotations

import hashlib
from math import erf, sqrt

import numpy as np
import pytest

from lora_compress.quantization.entropy.ans import AnsReader, AnsWriter, joint_counts, uniform
from lora_compress.quantization.entropy.tables import (
    MAX_SCALE,
    SHAPES,
    base_counts,
    bit_contexts,
    bit_counts,
    cell_centres,
    signed_counts,
)
from tests.core.quantization import reference_tables
from tests.core.quantization.reference_decoder import Stack, read_grouped


def gaussian_cells(scale: int, edges: np.ndarray) -> np.ndarray:
    sigma = 2 ** ((scale - 25) / 8)
    return np.diff([0.5 + 0.5 * erf(edge / sigma / sqrt(2)) for edge in edges])


def test_all_tables_are_the_ones_of_the_format() -> None:
    digest = hashlib.sha256()
    for shape in range(SHAPES):
        for scale in range(1, MAX_SCALE + 1):
            for plane in (0, 1, 2):
                if scale + 8 * plane <= 64:
                    digest.update(base_counts(scale, shape, plane).astype("<u4").tobytes())
                if plane:
                    digest.update(signed_counts(scale, shape, plane).astype("<u4").tobytes())
                digest.update(bit_counts(scale, shape, plane, 0).astype("<u4").tobytes())
                digest.update(cell_centres(scale, shape, plane)[0].astype("<u4").tobytes())
    assert digest.hexdigest() == "557ac0bf908ac50ed05b8a7b6c596c4be29bf6364bd264d674f92e46e1bcca5e"


@pytest.mark.parametrize("shape", range(SHAPES))
@pytest.mark.parametrize("scale", [1, 12, 21, 30, 40, 41, 50, 56, 57])
def test_tables_are_made_as_the_specification_says(scale: int, shape: int) -> None:
    for plane in (0, 1, 3, 8):
        fine = min(plane, (64 - scale) // 8)
        if scale <= MAX_SCALE:
            assert base_counts(scale, shape, fine).tolist() == reference_tables.base(scale, shape, fine)
            if plane:
                assert signed_counts(scale, shape, plane).tolist() == reference_tables.signed(scale, shape, plane)
        for context in bit_contexts(scale, plane):
            assert bit_counts(scale, shape, plane, context).tolist() == reference_tables.bit(scale, shape, plane, context)


@pytest.mark.parametrize("scale", [1, 9, 17, 25, 33, 41, 49, 56])
def test_gaussian_tables_cost_next_to_nothing_over_the_true_distribution(scale: int) -> None:
    for fine in (0, 1):
        counts = base_counts(scale, 0, fine)
        last = (len(counts) - 2) // 2
        width = 2**fine
        edges = np.array([-(k + 1) * width + 0.5 for k in range(last, -1, -1)] + [(k + 1) * width - 0.5 for k in range(last + 1)])
        true = gaussian_cells(scale + 8 * fine, edges)
        coded = np.array([counts[2 * abs(k) - (k > 0)] for k in range(-last, last + 1)]) / 2**24
        assert 0 <= (true * np.log2(true / coded)).sum() + 1 - true.sum() < 2e-4


@pytest.mark.parametrize("shape", range(SHAPES))
def test_counts_are_positive_and_sum_to_the_precision(shape: int) -> None:
    for scale in range(1, MAX_SCALE + 1):
        for fine in range((64 - scale) // 8 + 1):
            counts = base_counts(scale, shape, fine)
            assert counts.sum() == 1 << 24 and counts.min() > 0
            assert (counts[1:-1:2] == counts[2:-1:2]).all()


@pytest.mark.parametrize("shape", range(SHAPES))
def test_centres_lie_inside_their_cells_and_towards_zero(shape: int) -> None:
    for scale in (1, 9, 20, 33, 50):
        centres = cell_centres(scale, shape, 0)[0] / 4096
        cells = np.arange(len(centres))
        assert centres[0] == 0
        assert (centres[1:] > cells[1:] - 0.5).all() and (centres[1:] <= cells[1:] + 0.01).all()
        centres, negative_zero = (part / 4096 for part in cell_centres(scale, shape, 2))
        cells = np.arange(len(centres))
        assert (centres > cells - 0.125).all() and (centres <= cells + 0.39).all()
        assert centres[0] <= negative_zero <= 0.51


def test_shapes_differ_in_their_tails() -> None:
    tails = [float(base_counts(33, shape, 0)[13:].sum()) for shape in range(SHAPES)]
    assert tails == sorted(tails) and tails[0] < tails[-1] / 5


@pytest.mark.parametrize("shape", range(SHAPES))
def test_constriction_uses_exactly_the_integer_tables(shape: int) -> None:
    random = np.random.default_rng(shape)
    for scale in range(1, MAX_SCALE + 1):
        counts = base_counts(scale, shape, 0)
        symbols = np.concatenate([np.arange(len(counts)), random.choice(len(counts), 60, p=counts / 2**24)])
        writer = AnsWriter()
        writer.write(symbols, base_counts, scale, shape, 0)
        stack = Stack(writer.to_bytes())
        assert [stack.read(counts.tolist()) for _ in symbols] == symbols.tolist()
        assert stack.empty


@pytest.mark.parametrize(
    ("counts_of", "key"), [(bit_counts, (1, 3, 0, 0)), (bit_counts, (1, 0, 0, 4)), (bit_counts, (20, 0, 2, 1))]
)
def test_constriction_uses_exactly_the_joint_tables(counts_of, key) -> None:  # type: ignore[no-untyped-def]
    counts = joint_counts(counts_of, *key)
    assert counts.sum() == 1 << 24 and counts.min() > 0
    writer = AnsWriter()
    writer.write(np.arange(len(counts)), joint_counts, counts_of, *key)
    stack = Stack(writer.to_bytes())
    assert [stack.read(counts.tolist()) for _ in counts] == list(range(len(counts)))
    assert stack.empty


@pytest.mark.parametrize("count", [2, 3, 4, 7, 256, 1023, 32767])
def test_uniform_tables_round_trip(count: int) -> None:
    symbols = np.random.default_rng(count).integers(0, count, 500)
    writer = AnsWriter()
    writer.write(symbols, uniform, count)
    chunk = writer.to_bytes()
    reader = AnsReader(chunk)
    assert reader.read(500, uniform, count).tolist() == symbols.tolist()
    reader.finish()
    assert len(chunk) <= 500 * np.log2(count) / 8 + 8


@pytest.mark.parametrize("count", [0, 1, 4, 7, 8, 39, 500])
@pytest.mark.parametrize(
    ("counts_of", "key"), [(bit_counts, (20, 1, 0, 2)), (bit_counts, (1, 0, 0, 0)), (bit_counts, (30, 2, 1, 1)), (uniform, (2,))]
)
def test_grouped_symbols_are_read_as_the_specification_says(counts_of, key, count: int) -> None:  # type: ignore[no-untyped-def]
    counts = counts_of(*key)
    symbols = np.random.default_rng(count).choice(len(counts), count, p=counts / 2**24).astype(np.int32)
    writer = AnsWriter()
    writer.write_grouped(symbols, counts_of, *key)
    chunk = writer.to_bytes()
    reader = AnsReader(chunk)
    assert np.array_equal(reader.read_grouped(count, counts_of, *key), symbols)
    reader.finish()
    stack = Stack(chunk)
    assert read_grouped(stack, count, counts.tolist()) == symbols.tolist()
    assert stack.empty


def test_integers_of_any_length_round_trip() -> None:
    values = np.array([0, 1, 255, 256, 65535, 65536, 2**24 - 1, 2**24, 2**32 - 1])
    writer = AnsWriter()
    writer.write_integers(values)
    assert AnsReader(writer.to_bytes()).read_integers(len(values)).tolist() == values.tolist()
