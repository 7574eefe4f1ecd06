"""The entropy codec: size against Shannon's bound, exact payloads, estimates, and whatever input or bytes may come."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_compress.errors import FormatError, LoraCompressError, SettingsError
from lora_compress.quantization.entropy.codec import components_told, decode_entropy, encode_entropy, predict_entropy
from lora_compress.quantization.entropy.integers import quantize_module, restore_module
from lora_compress.quantization.entropy.refine import refine_module, rows_squared_error
from lora_compress.quantization.entropy.stages import Stages
from tests.core.quantization import reference_decoder
from tests.core.quantization.gaussian_modules import coded_bits, dense_error, module, shannon_bits

ROOT = Path(__file__).resolve().parents[3]


def whole(encoded, rows, step):  # type: ignore[no-untyped-def]
    """Decoded rows in the places of the input's components."""
    coded = decode_entropy(encoded.chunks, encoded.rank, rows[0].shape[1], rows[1].shape[1], step)
    placed = tuple(torch.zeros_like(part) for part in rows)
    for target, part in zip(placed, coded, strict=True):
        target[list(encoded.kept)] = part
    return placed


@pytest.mark.parametrize("width", [320, 640])
@pytest.mark.parametrize("bits", [0.5, 1, 1.5, 2, 3, 4, 5, 6, 8])
def test_rank_16_is_within_three_tenths_of_a_bit_of_shannon(bits: float, width: int) -> None:
    rows = module(16, width, width, lambda i: 1.0)
    step = 4.13 * 2.0**-bits / width**0.5
    encoded = encode_entropy(*rows, step, refine=False)
    weights = 16 * 2 * width
    assert coded_bits(encoded) / weights == pytest.approx(bits, abs=0.3)
    assert coded_bits(encoded) - shannon_bits(rows, whole(encoded, rows, step)) < 0.30 * weights


@pytest.mark.parametrize("step", [0.1, 0.03, 0.01, 0.001])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_falling_spectra_are_as_close_to_reverse_water_filling(power: float, step: float) -> None:
    rows = module(32, 640, 320, lambda i: i**-power)
    encoded = encode_entropy(*rows, step, refine=False)
    assert coded_bits(encoded) - shannon_bits(rows, whole(encoded, rows, step)) < 0.30 * encoded.rank * 960


@pytest.mark.parametrize("stages", [Stages(), Stages(3, 1), Stages(8), Stages(18, 3), Stages(7, 5)])
@pytest.mark.parametrize("step", [0.2, 0.05, 0.01, 0.0003, 0.00003])
def test_payload_is_what_the_specification_says(step: float, stages: Stages) -> None:
    rows = module(5, 40, 23, lambda i: 1 / i)
    rows[0][1, 7] = 9.0  # an escape
    encoded = encode_entropy(*rows, step, stages=stages, refine=False)
    for count in range(1, stages.number + 1):
        found = decode_entropy(encoded.chunks[:count], encoded.rank, 40, 23, step, stages)
        wanted = reference_decoder.decode(encoded.chunks[:count], encoded.rank, 40, 23, step, *stages)
        for part, reference in zip(found, wanted, strict=True):
            np.testing.assert_allclose(part.numpy(), np.array(reference[: len(part)]).reshape(part.shape), rtol=3e-7)
            assert len(part) == components_told(encoded.chunks[:count], encoded.rank, stages)
            assert not np.any(reference[len(part) :])  # of these nothing is told yet


def test_decoding_in_another_process_from_bytes_alone_is_exact(tmp_path: Path) -> None:
    rows = module(8, 100, 60, lambda i: 1 / i)
    encoded = encode_entropy(*rows, 0.01, stages=Stages(4))
    for number, chunk in enumerate(encoded.chunks):
        (tmp_path / str(number)).write_bytes(chunk)
    code = (
        "import sys, torch; from pathlib import Path; from lora_compress.quantization.entropy.codec import decode_entropy\n"
        "from lora_compress.quantization.entropy.stages import Stages\n"
        "folder, rank = Path(sys.argv[1]), int(sys.argv[2])\n"
        "chunks = [(folder / str(number)).read_bytes() for number in range(4)]\n"
        "torch.save(decode_entropy(chunks, rank, 100, 60, 0.01, Stages(4)), folder / 'out.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(encoded.rank)], check=True, cwd=ROOT)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    wanted = decode_entropy(encoded.chunks, encoded.rank, 100, 60, 0.01, Stages(4))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 6),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    stages=st.builds(Stages, st.integers(1, 20), st.integers(1, 5)),
    exponent=st.integers(-30, 30),
    fineness=st.floats(-2, 16),
    tail=st.sampled_from([1, 3, 7]),
    seed=st.integers(0, 2**31),
)
def test_every_module_decodes_to_its_integers(rank, inputs, outputs, stages, exponent, fineness, tail, seed) -> None:  # type: ignore[no-untyped-def]
    down, up = module(rank, inputs, outputs, lambda i: 2.0**exponent, seed)
    down = down.sign() * (down / down.abs().max()).abs() ** tail * 2.0**exponent
    step = float(down.norm() * up.norm()) * 2.0**-fineness
    encoded = encode_entropy(down, up, step, stages=stages, refine=False)
    found = decode_entropy(encoded.chunks, encoded.rank, inputs, outputs, step, stages)
    quantized = quantize_module(down, up, step)
    wanted = restore_module(quantized.taken(np.searchsorted(quantized.kept, encoded.kept)), step)
    assert all(np.array_equal(part.numpy(), reference) for part, reference in zip(found, wanted, strict=True))


def test_error_and_size_are_monotone_in_the_step() -> None:
    rows = module(16, 200, 300, lambda i: i**-0.5)
    steps = [0.2 * 1.3**-i for i in range(24)]
    results = [(encoded := encode_entropy(*rows, step, refine=False), whole(encoded, rows, step)) for step in steps]
    sizes, errors = [coded_bits(e) for e, _ in results], [dense_error(rows, w) for _, w in results]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize("width", [40, 640])
def test_refinement_lowers_the_error_at_equal_size(width: int) -> None:
    rows = module(16, width, width, lambda i: i**-0.3)
    step = 0.5 / width**0.5
    plain, refined = (encode_entropy(*rows, step, refine=refine) for refine in (False, True))
    errors = [dense_error(rows, whole(encoded, rows, step)) for encoded in (plain, refined)]
    assert errors[1] < 0.97 * errors[0]
    spent = (coded_bits(refined) - coded_bits(plain)) / (32 * width)
    assert 0.5 * math.log2(errors[1] / errors[0]) + spent < -0.02


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_refinement_uses_what_the_factors_leave_free(bits: int) -> None:
    rows = module(32, 320, 320, lambda i: i**-0.5)
    step = 0.3 * 4.13 * 2.0**-bits / 320**0.5
    plain, refined = (encode_entropy(*rows, step, refine=refine) for refine in (False, True))
    errors = [dense_error(rows, whole(encoded, rows, step)) for encoded in (plain, refined)]
    spent = (coded_bits(refined) - coded_bits(plain)) / (64 * 320)
    assert 0.5 * math.log2(errors[1] / errors[0]) + spent < -0.08


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 12),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    power=st.floats(0, 4),
    fineness=st.floats(-2, 12),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 2**31),
)
def test_refinement_never_costs_more_for_what_it_gains(rank, widths, power, fineness, exponent, seed) -> None:  # type: ignore[no-untyped-def]
    rows = module(rank, *widths, lambda i: 2.0**exponent * i**-power, seed)
    step = 2.0 ** (exponent - fineness)
    plain, refined = quantize_module(*rows, step), refine_module(*rows, step)
    costs = []
    for found in (plain, refined):
        error = rows_squared_error(rows[0].numpy(), rows[1].numpy(), *restore_module(found, step), found.kept)
        costs.append(0.5 * math.log2(max(error, 1e-300)) + found.payload_bits / max(plain.rank * sum(widths), 1))
    assert costs[1] <= costs[0]


def test_error_from_factors_is_that_of_the_dense_matrices() -> None:
    rows = module(6, 30, 20, lambda i: 1 / i)
    for step in (0.3, 0.1, 1e-4):
        quantized = quantize_module(*rows, step)
        coded = restore_module(quantized, step)
        placed = tuple(torch.zeros_like(part) for part in rows)
        for target, part in zip(placed, coded, strict=True):
            target[quantized.kept.tolist()] = torch.from_numpy(part)
        found = rows_squared_error(rows[0].numpy(), rows[1].numpy(), *coded, quantized.kept)
        assert found == pytest.approx(dense_error(rows, placed), rel=1e-3)


@pytest.mark.parametrize("step", [1e9, 0.1, 0.03, 0.01, 0.001])
@pytest.mark.parametrize("stages", [Stages(), Stages(5), Stages(18, 3)])
def test_a_prediction_is_the_module_without_its_bytes(step: float, stages: Stages) -> None:
    rows = module(16, 640, 320, lambda i: i**-0.5)
    coded, predicted = (f(*rows, step, stages=stages) for f in (partial(encode_entropy, refine=False), predict_entropy))
    assert (predicted.rank, predicted.kept, len(predicted.chunks)) == (coded.rank, coded.kept, len(coded.chunks))
    assert all(torch.equal(a, b) for a, b in zip(predicted.rows, coded.rows, strict=True))
    decoded = decode_entropy(coded.chunks, coded.rank, 640, 320, step, stages)
    assert all(torch.equal(a, b) for a, b in zip(coded.rows, decoded, strict=True))
    assert coded_bits(predicted) == pytest.approx(
        coded_bits(coded), rel=0.001 if stages.number == 1 else 0.02, abs=40 * stages.number
    )


def test_components_that_round_to_zero_cost_nothing() -> None:
    rows = module(12, 300, 200, lambda i: 1.0 if i % 3 else 1e-6)
    rows[0][4] = 0.0
    encoded = encode_entropy(*rows, 0.01, refine=False)
    assert encoded.kept == tuple(i for i in range(12) if (i + 1) % 3 and i != 4)
    strong = tuple(part[list(encoded.kept)] for part in rows)
    assert encode_entropy(*strong, 0.01, refine=False).chunks == encoded.chunks
    assert encode_entropy(*rows, 1e9, stages=Stages(3)).chunks == [b"", b"", b""]
    nothing = decode_entropy([b"", b"", b""], 0, 300, 200, 1e9, Stages(3))
    assert [tuple(part.shape) for part in nothing] == [(0, 300), (0, 200)]


@pytest.mark.parametrize("outlier", [30.0, 3e3])
def test_outliers_do_not_coarsen_the_rest(outlier: float) -> None:
    rows = module(4, 400, 400, lambda i: 1.0)
    rows[0][2, 17] = outlier
    step = 0.01
    coded = whole(encode_entropy(*rows, step, refine=False), rows, step)
    sigma = rows[0].norm(dim=1) * rows[1].norm(dim=1)
    for exact, found in zip(rows, coded, strict=True):
        assert float(((exact - found).abs() * sigma.sqrt().unsqueeze(1)).max()) < 0.6 * step * 2**0.25 + 1e-6 * outlier**1.5


def test_bad_input_is_refused_with_a_reason() -> None:
    rows = module(2, 8, 8, lambda i: 1.0)
    with pytest.raises(SettingsError, match="step"):
        encode_entropy(*rows, 0.0)
    with pytest.raises(SettingsError, match="larger step"):
        encode_entropy(*rows, 1e-12)
    with pytest.raises(SettingsError, match="stages"):
        encode_entropy(*rows, 0.1, stages=Stages(0))
    with pytest.raises(FormatError, match="NaN"):
        encode_entropy(rows[0] * math.nan, rows[1], 0.1)


@pytest.mark.parametrize(
    ("rank", "inputs", "outputs", "step", "stages"),
    [
        (10**6, 10**9, 8, 0.1, ()),
        (1, 2**60, 8, 0.1, ()),
        (-1, 8, 8, 0.1, ()),
        (1, 8, 8, math.nan, ()),
        (1, 8, 8, 0.1, (0,)),
        (1, 8, 8, 0.1, (2, 0)),
    ],
)
def test_declarations_that_cannot_be_are_refused_before_memory_is_taken(rank, inputs, outputs, step, stages) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FormatError):
        decode_entropy([b"\1" * 40], rank, inputs, outputs, step, Stages(*stages))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_hostile_bytes_are_refused_or_decode_to_finite_rows(data: st.DataObject) -> None:
    layers = data.draw(st.sampled_from([1, 4]))
    if data.draw(st.booleans()):
        chunks = [data.draw(st.binary(max_size=60)) for _ in range(layers)]
    else:
        encoded = encode_entropy(*module(3, 20, 30, lambda i: 1 / i), 0.02, stages=Stages(layers))
        chunks = [bytearray(chunk) for chunk in encoded.chunks]
        chosen = data.draw(st.sampled_from([chunk for chunk in chunks if chunk]))
        chosen[data.draw(st.integers(0, len(chosen) - 1))] ^= data.draw(st.integers(1, 255))
        chunks = [bytes(chunk) for chunk in chunks]
    try:
        rows = decode_entropy(chunks, 3, 20, 30, 0.02, Stages(layers))
    except FormatError:
        return
    assert all(torch.isfinite(part).all() for part in rows)


def test_without_the_entropy_coder_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(LoraCompressError, match="pip install constriction"):
        encode_entropy(*module(2, 8, 8, lambda i: 1.0), 0.1)
