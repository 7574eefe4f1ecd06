"""Payloads in layers: any prefix is a LoRA nearly as good as one coded afresh in as many bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_compress.quantization.entropy import decode_entropy, encode_entropy
from lora_compress.quantization.schedule import row_runs
from tests.core.quantization.gaussian_modules import coded_bits, dense_error, module

SPECTRA = {"root": lambda i: i**-0.5, "inverse": lambda i: 1 / i, "exponential": lambda i: 0.85**i}
LAYERS, STEP = 10, 0.004


def modules(spectrum: str) -> list:  # type: ignore[type-arg]
    """A small file: modules whose strength spans a factor of 8, as those of a trained LoRA do."""
    gains = np.exp2(np.linspace(-1.5, 1.5, 6)).tolist()
    return [module(16, 320, 320, lambda i, g=gain: g * SPECTRA[spectrum](i), seed) for seed, gain in enumerate(gains)]


def fresh_curve(files: list) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Bits and squared errors of the file coded afresh at many steps."""
    bits, errors = [], []
    for step in STEP * 2.0 ** np.arange(-0.5, 6.5, 0.25):
        encoded = [encode_entropy(*rows, float(step), refine=False) for rows in files]
        bits.append(sum(map(coded_bits, encoded)))
        decoded = [decode_entropy(each.chunks, each.rank, 320, 320, float(step)) for each in encoded]
        errors.append(sum(dense_error(rows, coded) for rows, coded in zip(files, decoded, strict=True)))
    coded = np.array(bits) > 0
    return np.array(bits)[coded], np.array(errors)[coded]


def cut_costs(files: list) -> list[tuple[float, int, int]]:  # type: ignore[type-arg]
    """Bytes over those of coding afresh at the same error, at every cut."""
    bits, errors = fresh_curve(files)
    encoded = [encode_entropy(*rows, STEP, layers=LAYERS, refine=False) for rows in files]
    cuts = []
    for layer in range(LAYERS):
        for finer in range(1, len(files) + 1):  # modules that have this layer; all but the last are cuts within a layer
            counts = [layer + (number < finer) for number in range(len(files))]
            size = sum(coded_bits(each, count) for each, count in zip(encoded, counts, strict=True))
            error = 0.0
            for rows, each, count in zip(files, encoded, counts, strict=True):
                error += dense_error(rows, decode_entropy(each.chunks[:count], each.rank, 320, 320, STEP, LAYERS))
            if layer and errors[0] < error < errors[-1]:
                fresh = float(np.exp(np.interp(np.log(error), np.log(errors), np.log(bits))))
                cuts.append((size / fresh, layer, finer))
    return cuts


@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_any_cut_costs_at_most_a_tenth_over_coding_afresh(spectrum: str) -> None:
    cuts = cut_costs(modules(spectrum))
    assert len(cuts) > 20
    assert max(cuts)[0] < 1.10, max(cuts)


@pytest.mark.parametrize("power", [0.0, 0.25])
def test_where_all_components_are_alike_a_cut_costs_little_more(power: float) -> None:
    """All rows then have the same pass in the same layer; halfway through it, half of them lack a bit per weight."""
    cuts = cut_costs([module(16, 320, 320, lambda i: 0.3 * i**-power, seed) for seed in range(4)])
    assert len(cuts) > 20
    assert max(cuts)[0] < 1.14, max(cuts)
    assert np.mean([cost for cost, _, _ in cuts]) < 1.05


def test_all_layers_together_are_the_payload_of_one_layer_but_for_its_size() -> None:
    rows = module(16, 320, 200, lambda i: i**-0.5)
    for step in (0.05, 0.004, 0.0005):
        single = encode_entropy(*rows, step, refine=True)
        layered = encode_entropy(*rows, step, layers=LAYERS, refine=True)
        found = decode_entropy(layered.chunks, layered.rank, 320, 200, step, LAYERS)
        wanted = decode_entropy(single.chunks, single.rank, 320, 200, step)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert coded_bits(layered) < 1.02 * coded_bits(single) + 64 * LAYERS


def test_each_layer_lowers_the_error() -> None:
    rows = module(16, 320, 320, lambda i: i**-0.5)
    encoded = encode_entropy(*rows, STEP, layers=LAYERS, refine=False)
    errors = [
        dense_error(rows, decode_entropy(encoded.chunks[:count], encoded.rank, 320, 320, STEP, LAYERS))
        for count in range(LAYERS + 1)
    ]
    assert all(b < a or not chunk for a, b, chunk in zip(errors, errors[1:], encoded.chunks, strict=False))
    assert errors[-1] < 0.01 * errors[0]


def test_passes_never_go_back_and_all_are_made_in_the_end() -> None:
    scales = np.concatenate([np.arange(1, 169), np.arange(168, 0, -1)])
    shapes = np.arange(len(scales)) % 3
    whole = {row: run.ends[-1] for run in row_runs(scales, shapes, 1) for row in run.rows.tolist()}
    for layers in (1, 2, 5, 30):
        runs = row_runs(scales, shapes, layers)
        ends = {row: np.array(run.ends) for run in runs for row in run.rows.tolist()}
        assert sorted(ends) == list(range(len(scales)))
        assert all((np.diff(end) >= 0).all() and end[-1] == whole[row] for row, end in ends.items())
        assert all(((ends[row] > 0) == (ends[row + 168] > 0)).all() for row in range(168))
        assert all((scales[run.rows] == run.scale).all() and (shapes[run.rows] == run.shape).all() for run in runs)
