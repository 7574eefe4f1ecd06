"""Payloads in layers: any prefix is a LoRA nearly as good as one coded afresh in as many bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_compress.errors import FormatError
from lora_compress.quantization.entropy.codec import decode_entropy, encode_entropy
from lora_compress.quantization.entropy.stages import Stages
from tests.core.quantization.gaussian_modules import coded_bits, dense_error, module

SPECTRA = {"root": lambda i: i**-0.5, "inverse": lambda i: 1 / i, "exponential": lambda i: 0.85**i}
STAGES, STEP = Stages(12, 2), 0.004
PHASES = (0, 4, 2, 6)  # eighths of octaves, of the steps of neighbours, as in files

Rows = tuple[torch.Tensor, torch.Tensor]


def modules(spectrum: str) -> list[Rows]:
    """A small file: modules whose strength spans a factor of 8, as those of a trained LoRA do."""
    gains = np.exp2(np.linspace(-1.5, 1.5, 6)).tolist()
    return [module(32, 320, 320, lambda i, g=gain: g * SPECTRA[spectrum](i), seed) for seed, gain in enumerate(gains)]


def strong(rows: Rows, step: float, least: float) -> Rows:
    """The components that may be worth their bits at a step: their rows, times sigma, deviate by `least` steps or more."""
    sigma = rows[0].norm(dim=1) * rows[1].norm(dim=1)
    kept = sigma >= least * step * 320**0.5
    return rows[0][kept], rows[1][kept]


def fresh_curve(files: list[Rows], least: float) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors, rising, and bits of the file coded afresh at many steps."""
    points = []
    for step in (STEP * 2.0 ** np.arange(-0.5, 6.5, 0.25)).tolist():
        encoded = [encode_entropy(*strong(rows, step, least), step, refine=False) for rows in files]
        decoded = [decode_entropy(each.chunks, each.rank, 320, 320, step) for each in encoded]
        if bits := sum(map(coded_bits, encoded)):
            points.append((sum(map(dense_error, files, decoded)), bits))
    errors, bits = np.array(sorted(points)).T
    return errors, np.minimum.accumulate(bits)


def cut_costs(files: list[Rows]) -> list[tuple[float, int, int]]:
    """Bytes over those of coding afresh at the same error, module and layer of every cut that leaves an error of at most 0.3."""
    curves = [fresh_curve(files, least) for least in (0.0, 0.5, 0.7, 0.9, 1.1)]
    phases = [PHASES[number % len(PHASES)] for number in range(len(files))]
    steps = [STEP * 2 ** (phase / 8) for phase in phases]
    encoded = [
        encode_entropy(*strong(rows, STEP, 0.8), step, stages=STAGES, refine=False) for rows, step in zip(files, steps, strict=True)
    ]
    largest = 0.09 * sum(dense_error(rows, (rows[0] * 0, rows[1] * 0)) for rows in files)
    layers = [(number, layer) for layer in range(STAGES.number) for number in range(len(files))]
    counts, cuts = [0] * len(files), []
    for number, layer in sorted(layers, key=lambda each: -STAGES.slope(each[1]) - phases[each[0]] / 4):
        counts[number] += 1
        size = sum(map(coded_bits, encoded, counts))
        decoded = [
            decode_entropy(each.chunks[:count], each.rank, 320, 320, step, STAGES)
            for each, count, step in zip(encoded, counts, steps, strict=True)
        ]
        error = sum(map(dense_error, files, decoded))
        fresh = [np.exp(np.interp(np.log(error), np.log(e), np.log(b))) for e, b in curves if e[0] < error < e[-1]]
        if error < largest and fresh:
            cuts.append((float(size / min(fresh)), number, layer))
    return cuts


@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_any_cut_costs_less_than_a_tenth_over_coding_afresh(spectrum: str) -> None:
    cuts = cut_costs(modules(spectrum))
    assert len(cuts) > 20
    assert max(cuts)[0] < 1.09, max(cuts)
    assert np.mean([cost for cost, _, _ in cuts]) < 1.06


@pytest.mark.parametrize("power", [0.0, 0.25])
def test_where_all_components_are_alike_a_cut_costs_little_more(power: float) -> None:
    """All rows of a module then have the same pass in the same layer; modules have theirs at different places."""
    cuts = cut_costs([module(16, 320, 320, lambda i: 0.3 * i**-power, seed) for seed in range(4)])
    assert len(cuts) >= 6
    assert max(cuts)[0] < 1.06, max(cuts)
    assert np.mean([cost for cost, _, _ in cuts]) < 1.04


def test_all_layers_together_are_the_payload_of_one_layer_but_for_its_size() -> None:
    rows = module(16, 320, 200, lambda i: i**-0.5)
    for step in (0.05, 0.004, 0.0005):
        single = encode_entropy(*rows, step, refine=True)
        layered = encode_entropy(*rows, step, stages=STAGES, refine=True)
        found = decode_entropy(layered.chunks, layered.rank, 320, 200, step, STAGES)
        wanted = decode_entropy(single.chunks, single.rank, 320, 200, step)
        order = np.argsort(layered.kept)
        assert all(torch.equal(a[order], b) for a, b in zip(found, wanted, strict=True))
        assert coded_bits(layered) < 1.02 * coded_bits(single) + 64 * STAGES.number


def test_each_layer_lowers_the_error() -> None:
    rows = module(16, 320, 320, lambda i: i**-0.5)
    encoded = encode_entropy(*rows, STEP, stages=STAGES, refine=False)
    errors = [
        dense_error(rows, decode_entropy(encoded.chunks[:count], encoded.rank, 320, 320, STEP, STAGES))
        for count in range(STAGES.number + 1)
    ]
    assert all(b < a or not chunk for a, b, chunk in zip(errors, errors[1:], encoded.chunks, strict=False))
    assert errors[-1] < 0.01 * errors[0]


def test_a_component_costs_nothing_before_the_layer_in_which_it_starts() -> None:
    """Forty weak components beside a strong one add next to nothing to the first layers, and none is told of in them."""
    strong_one, weak = module(1, 320, 320, lambda i: 1.0), module(40, 320, 320, lambda i: 0.1, seed=1)
    both = torch.cat([strong_one[0], weak[0]]), torch.cat([strong_one[1], weak[1]])
    alone, together = (encode_entropy(*rows, STEP, stages=STAGES, refine=False) for rows in (strong_one, both))
    first = next(layer for layer, chunk in enumerate(alone.chunks) if len(chunk) > 100)
    assert len(together.chunks[first]) <= len(alone.chunks[first]) + 4  # the number of those that start, and tables that suit all
    down, up = decode_entropy(together.chunks[: first + 1], together.rank, 320, 320, STEP, STAGES)
    assert (len(down), len(up)) == (1, 1)


def test_each_layer_vouches_for_the_next() -> None:
    encoded = encode_entropy(*module(8, 100, 60, lambda i: 1 / i), STEP, stages=STAGES)
    other = encode_entropy(*module(8, 100, 60, lambda i: 1 / i, seed=1), STEP, stages=STAGES)
    for layer in [layer for layer in range(STAGES.number) if any(encoded.chunks[:layer]) and other.chunks[layer]]:
        swapped = [*encoded.chunks[:layer], other.chunks[layer], *encoded.chunks[layer + 1 :]]
        with pytest.raises(FormatError):
            decode_entropy(swapped, encoded.rank, 100, 60, STEP, STAGES)
        with pytest.raises(FormatError):
            decode_entropy(swapped[: layer + 1], encoded.rank, 100, 60, STEP, STAGES)
