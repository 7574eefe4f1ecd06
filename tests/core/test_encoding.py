"""One module to bytes and back: what is decoded is what was encoded, and bytes that do not fit their entry are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core.layouts.files import random
from core.samples import falling
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_compress import FormatError, QuantizationSettings
from lora_compress.packed.index import ModuleRecord
from lora_compress.packed.module import decode_module, decode_rows, encode_module, spread_channels
from lora_compress.quantization import ModulePlan

CODECS = {
    **{f"int{bits}": QuantizationSettings(bits=bits) for bits in (2, 3, 4, 5, 6, 8)},
    "one block": QuantizationSettings(bits=4, group_size=1024),
    "static": QuantizationSettings(bits=6, strategy="static"),
    "nf4": QuantizationSettings(bits=4, strategy="nf4", group_size=32),
    "mixed": QuantizationSettings(strategy="mixed"),
    "entropy": QuantizationSettings(strategy="entropy"),
    "unrefined": QuantizationSettings(strategy="entropy", refine=False),
    "progressive": QuantizationSettings(strategy="entropy", progressive=True),
}


def encoded(codec: str, rank: int = 6, outputs: int = 24, inputs: int = 20, kernel: tuple[int, ...] = (), kept=(None, None)):
    """An entry, its layers, and the rows that were encoded."""
    shape = ModuleRecord("m", outputs, inputs, kernel, rank, "", {}, kept)
    columns, rows = shape.stored
    down, up = falling(rank, columns, power=0.5), falling(rank, rows, seed=1, power=0.5)
    strategy = CODECS[codec].strategy
    bits = tuple(sorted(((2, 3, 4, 5, 6, 8)[i % 6] for i in range(rank)), reverse=True)) if strategy == "mixed" else None
    choice = ModulePlan(rank, bits, 0.2 if strategy == "entropy" else None)
    return encode_module(shape, down, up, choice, CODECS[codec]), down, up


@settings(max_examples=80, deadline=None)
@given(
    codec=st.sampled_from(sorted(CODECS)),
    rank=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (2,), (1, 2, 3)]),
)
def test_a_module_comes_back_as_its_rows(codec, rank, sizes, kernel) -> None:
    coded, down, up = encoded(codec, rank, *sizes, kernel)
    entry = coded.entry
    if not entry.rank:
        assert codec in ("entropy", "unrefined", "progressive")
        return
    assert entry.rank <= rank
    rows = decode_rows(entry, coded.chunks)
    assert all(torch.equal(row, told) for row, told in zip(rows, coded.rows, strict=True))
    update = decode_module(entry, coded.chunks)
    assert (update.rank, update.alpha, update.kernel) == (entry.rank, float(entry.rank), kernel)
    assert tuple(update.down.shape) == (entry.rank, sizes[1], *kernel)
    assert tuple(update.up.shape) == (sizes[0], entry.rank, *(1,) * len(kernel))
    assert torch.equal(update.down_matrix, rows[0]) and torch.equal(update.up_matrix.T, rows[1])
    if codec in ("int8", "int6", "static") and rank * sum(sizes) > 100:
        for row, exact in zip(rows, (down, up), strict=True):
            assert float((row - exact).norm()) < 0.2 * float(exact.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS)
def test_other_precisions_are_the_rounded_weights_and_none_overflows(codec: str, dtype: torch.dtype) -> None:
    coded, _, _ = encoded(codec)
    wide, narrow = (decode_module(coded.entry, coded.chunks, kind) for kind in (torch.float32, dtype))
    assert torch.equal(narrow.down, wide.down.to(dtype)) and torch.equal(narrow.up, wide.up.to(dtype))
    if coded.entry.codec == "entropy":  # whose weights are in proportion to one number
        entry = replace(coded.entry, parameters={**coded.entry.parameters, "step": 3e6})
        assert float(decode_module(entry, coded.chunks).down.abs().max()) > 1e5
        if dtype == torch.float16:
            with pytest.raises(FormatError, match="float32"):
                decode_module(entry, coded.chunks, dtype)


@pytest.mark.parametrize("codec", CODECS)
def test_kept_channels_go_to_their_places_and_the_others_are_zero(codec: str) -> None:
    kept = (1, 4, 5, 23), (0, 7, 8, 9, 19)
    coded, _, _ = encoded(codec, 3, kernel=(3, 3), kept=kept)
    down, up = spread_channels(coded.entry, *coded.rows)
    update = decode_module(coded.entry, coded.chunks)
    assert torch.equal(update.down_matrix, down) and torch.equal(update.up_matrix.T, up)
    by_channel = update.down.flatten(2)
    assert torch.equal(by_channel[:, list(kept[1])].flatten(1), coded.rows[0])
    assert torch.equal(update.up_matrix[list(kept[0])].T, coded.rows[1])
    others = [i for i in range(20) if i not in kept[1]], [i for i in range(24) if i not in kept[0]]
    assert not by_channel[:, others[0]].any() and not update.up_matrix[others[1]].any()


@pytest.mark.parametrize("codec", CODECS)
def test_fewer_components_are_a_beginning_of_fixed_width_payloads(codec: str) -> None:
    coded, _, _ = encoded(codec)
    if coded.entry.codec == "entropy":
        return
    few = replace(coded.entry, rank=2, parameters=dict(coded.entry.parameters))
    if "bits" in few.parameters:
        few = replace(few, parameters={**few.parameters, "bits": [[8, 1], [6, 1]]})
    size = len(coded.chunks[0])
    for length in range(size):
        try:
            rows = decode_rows(few, [coded.chunks[0][:length]])
        except FormatError:
            continue
        assert all(torch.equal(row, whole[:2]) for row, whole in zip(rows, coded.rows, strict=True))
        break
    else:
        pytest.fail("no beginning decodes")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("harm", ["shorter", "longer", "no chunk", "a chunk twice", "another rank", "other sizes"])
def test_bytes_that_do_not_fit_their_entry_are_refused(codec: str, harm: str) -> None:
    coded, _, _ = encoded(codec)
    entry, chunks = coded.entry, list(coded.chunks)
    filled = next(layer for layer, chunk in enumerate(chunks) if chunk)
    match harm:
        case "shorter":
            chunks[filled] = chunks[filled][:-1]
        case "longer":
            chunks[filled] += b"\x01"
        case "no chunk" if entry.codec != "entropy":  # of which none is a module of nothing known yet
            chunks = []
        case "no chunk":
            assert not decode_rows(entry, [])[0].any()
            return
        case "a chunk twice":
            chunks += chunks
        case "another rank":
            entry = replace(entry, rank=entry.rank - 1)
        case "other sizes":
            entry = replace(entry, outputs=entry.outputs + 30)
    with pytest.raises(FormatError):
        decode_module(entry, chunks)


PARAMETERS = [
    *({"block": value, "scales": "bf16"} for value in ("x", "64", None, [], -1, 2**70, 1e400, 64.0, True)),
    *({"block": 64, "scales": value} for value in ("fp64", None, 3, [])),
    {"block": 64},
    {"scales": "bf16"},
    {},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_parameters_that_make_no_sense_are_refused(parameters: dict[str, object]) -> None:
    coded, _, _ = encoded("int4")
    with pytest.raises(FormatError):
        decode_module(replace(coded.entry, parameters=parameters), coded.chunks)


@pytest.mark.parametrize(
    "bits", [[[4, 5]], [[4, 7]], [[7, 6]], [[4]], [4, 4], [[4, 6, 1]], "44", [[0, 6]], [[4, -6], [4, 12]], [[4.0, 6]], None]
)
def test_bits_that_are_not_those_of_the_components_are_refused(bits: object) -> None:
    coded, _, _ = encoded("mixed")
    with pytest.raises(FormatError):
        decode_module(replace(coded.entry, parameters={**coded.entry.parameters, "bits": bits}), coded.chunks)


@pytest.mark.parametrize("step", [0, -1, float("nan"), float("inf"), "x", None, [], 1e300, 10**400])
def test_a_step_that_is_none_is_refused(step: object) -> None:
    coded, _, _ = encoded("entropy")
    with pytest.raises(FormatError):
        decode_module(replace(coded.entry, parameters={"step": step, "layers": 1}), coded.chunks)


@pytest.mark.parametrize("layers", [0, -1, 65, 2**40, "x", "12", 12.0, None])
def test_layers_that_are_none_are_refused(layers: object) -> None:
    coded, _, _ = encoded("progressive")
    with pytest.raises(FormatError):
        decode_module(replace(coded.entry, parameters={**coded.entry.parameters, "layers": layers}), coded.chunks)


@pytest.mark.parametrize("codec", ["", "int7", "fp8e3m4", "INT4", "entropy2"])
def test_a_codec_that_is_not_known_is_named(codec: str) -> None:
    coded, _, _ = encoded("int4")
    with pytest.raises(FormatError, match=f"codec {codec}"):
        decode_module(replace(coded.entry, codec=codec), coded.chunks)


def test_every_beginning_of_layers_is_closer() -> None:
    coded, down, up = encoded("progressive", 6, 120, 150)
    exact = up.T @ down
    errors = []
    for count in range(len(coded.chunks) + 1):
        rows = decode_rows(coded.entry, coded.chunks[:count])
        errors.append(float((exact - rows[1].T @ rows[0]).norm() / exact.norm()))
    assert errors[0] == 1.0
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2


def test_rows_of_zeros_are_no_module() -> None:
    shape = ModuleRecord("m", 8, 6, (), 2, "", {})
    coded = encode_module(shape, torch.zeros(2, 6), random(2, 8), ModulePlan(2, step_size=0.1), CODECS["entropy"])
    assert coded.entry.rank == 0
    fixed = encode_module(shape, torch.zeros(2, 6), random(2, 8), ModulePlan(2), CODECS["int4"])
    assert not decode_module(fixed.entry, fixed.chunks).down.any()
