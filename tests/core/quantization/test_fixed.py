"""Payloads of fixed-width codes: what goes in comes out, rows can be cut off, sizes are known, damage is named."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_compress import FormatError, QuantizationSettings
from lora_compress.quantization import (
    CODECS,
    WIDTHS,
    FixedFormat,
    ModulePlan,
    component_size,
    decode_fixed,
    encode_fixed,
    fixed_size,
    unpack_bits,
)

RANK, INPUTS, OUTPUTS = 5, 70, 33
FORMATS = [FixedFormat(name, block_size) for name in CODECS for block_size in (16, 64, None)] + [
    FixedFormat("int4", 32, scale_dtype=torch.float32),
    FixedFormat("int8", None, static_scale=0.0625),
    FixedFormat("mixed", 32),
]
formats = pytest.mark.parametrize(
    "form", FORMATS, ids=lambda form: f"{form.codec}-{form.block_size}-{str(form.scale_dtype).split('.')[1]}"
)


def factors(rank: int = RANK, inputs: int = INPUTS, outputs: int = OUTPUTS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    falling = torch.exp(-0.5 * torch.arange(rank)).unsqueeze(1)
    down, up = torch.randn(rank, inputs, generator=generator), torch.randn(rank, outputs, generator=generator)
    return down * falling, up * falling


def bits_of(form: FixedFormat, rank: int = RANK) -> list[int] | None:
    return [8, 8, 5, 4, 3, 2, 6, 3, 2, 2][:rank] if form.codec == "mixed" else None


def by_the_codec(rows: Tensor, form: FixedFormat, bits: list[int] | None) -> Tensor:
    """Each row through its codec alone, without any packing."""
    names = [form.codec] * len(rows) if bits is None else [f"int{width}" for width in bits]
    results = []
    for row, name in zip(rows.split(1), names, strict=True):
        codes, scales = CODECS[name].encode(row, form.block_size, form.static_scale, form.scale_dtype)
        results.append(CODECS[name].decode(codes, scales, form.block_size))
    return torch.cat(results)


@formats
def test_decoding_gives_what_the_codec_gives(form: FixedFormat) -> None:
    down, up = factors()
    bits = bits_of(form)
    payload = encode_fixed(down, up, form, bits)
    found = decode_fixed(payload, RANK, INPUTS, OUTPUTS, form, bits)
    for rows, decoded in zip((down, up), found, strict=True):
        expected = by_the_codec(rows, form, bits)
        assert torch.equal(decoded, expected)
        assert decoded.dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        for wide, narrow in zip(found, decode_fixed(payload, RANK, INPUTS, OUTPUTS, form, bits, dtype), strict=True):
            assert narrow.dtype == dtype
            assert torch.equal(narrow, wide.to(dtype))


SEARCHED = [form for form in FORMATS if form.static_scale is None and form.scale_dtype == torch.bfloat16]


@pytest.mark.parametrize("form", SEARCHED, ids=lambda form: f"{form.codec}-{form.block_size}")
def test_what_was_decoded_is_encoded_to_the_same_values(form: FixedFormat) -> None:
    once = decode_fixed(encode_fixed(*factors(), form, bits_of(form)), RANK, INPUTS, OUTPUTS, form, bits_of(form))
    twice = decode_fixed(encode_fixed(*once, form, bits_of(form)), RANK, INPUTS, OUTPUTS, form, bits_of(form))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@formats
@pytest.mark.parametrize("rank", range(1, RANK))
def test_cutting_rows_off_the_end_leaves_the_smaller_lora(form: FixedFormat, rank: int) -> None:
    down, up = factors()
    bits = bits_of(form)
    fewer = None if bits is None else bits[:rank]
    whole = encode_fixed(down, up, form, bits)
    cut = whole[: fixed_size(rank, INPUTS, OUTPUTS, form, fewer)]
    assert cut == encode_fixed(down[:rank], up[:rank], form, fewer)
    for all_rows, rows in zip(
        decode_fixed(whole, RANK, INPUTS, OUTPUTS, form, bits), decode_fixed(cut, rank, INPUTS, OUTPUTS, form, fewer), strict=True
    ):
        assert torch.equal(rows, all_rows[:rank])


@settings(deadline=None, max_examples=60)
@given(
    codec=st.sampled_from([*CODECS, "mixed"]),
    block_size=st.sampled_from([None, 1, 7, 16, 64, 1000]),
    wide=st.booleans(),
    rank=st.integers(1, 10),
    inputs=st.integers(1, 100),
    outputs=st.integers(1, 100),
)
def test_sizes_are_known_beforehand(codec: str, block_size: int | None, wide: bool, rank: int, inputs: int, outputs: int) -> None:
    form = FixedFormat(codec, block_size, scale_dtype=torch.float32 if wide else torch.bfloat16)
    bits = bits_of(form, rank)
    payload = encode_fixed(*factors(rank, inputs, outputs), form, bits)
    assert len(payload) == fixed_size(rank, inputs, outputs, form, bits)
    rows = [component_size(inputs, outputs, form, width) for width in bits or [None] * rank]
    assert sum(rows) == len(payload)
    down, up = decode_fixed(payload, rank, inputs, outputs, form, bits)
    assert down.shape == (rank, inputs)
    assert up.shape == (rank, outputs)


def test_a_row_holds_its_four_parts_in_order() -> None:
    form = FixedFormat("int3", 32)
    down, up = factors(2, 40, 10)
    rows = encode_fixed(down, up, form)
    assert len(rows) == 2 * (2 * 2 + 2 + 15 + 4)
    for row, (x, y) in zip((rows[:25], rows[25:]), zip(down.split(1), up.split(1), strict=True), strict=True):
        scales = [struct.unpack("<f", b"\0\0" + row[i : i + 2])[0] for i in (0, 2, 4)]
        for rows_of, part, blocks in ((x, row[6:21], scales[:2]), (y, row[21:], scales[2:])):
            codes, expected = CODECS["int3"].encode(rows_of, 32)
            assert expected.flatten().tolist() == blocks
            assert torch.equal(unpack_bits(torch.tensor([list(part)], dtype=torch.uint8), 3, rows_of.shape[1]), codes)


def test_given_scales_are_stored() -> None:
    form = FixedFormat("int4", 32, scale_dtype=torch.float32)
    down, up = factors()
    scales = torch.rand(RANK, 3) + 0.1, torch.rand(RANK, 2) + 0.1
    found = decode_fixed(encode_fixed(down, up, form, scales=scales), RANK, INPUTS, OUTPUTS, form)
    for rows, chosen, decoded in zip((down, up), scales, found, strict=True):
        step = chosen.repeat_interleave(32, dim=1)[:, : rows.shape[1]]
        assert torch.allclose(decoded, (rows / step).round().clamp(-8, 7) * step)


@pytest.mark.parametrize(
    ("values", "codec", "block_size"),
    [
        (QuantizationSettings(3), "int3", 64),
        (QuantizationSettings(8, "static"), "int8", None),
        (QuantizationSettings(4, "nf4", group_size=32), "nf4", 32),
        (QuantizationSettings(None, "mixed", group_size=128), "mixed", 128),
    ],
)
def test_settings_name_their_format(values: QuantizationSettings, codec: str, block_size: int | None) -> None:
    coded = values.method.encode(*factors(), ModulePlan(RANK, (4,) * RANK), values)
    assert (coded.codec, coded.parameters["block"]) == (codec, block_size or 0)
    form = FixedFormat(codec, block_size, values.static_scale)
    assert coded.chunks == [encode_fixed(*factors(), form, (4,) * RANK if codec == "mixed" else None)]


GOOD = encode_fixed(*factors(), FixedFormat("int4", 64))
SHAPE = (RANK, INPUTS, OUTPUTS)


@pytest.mark.parametrize("payload", [b"", GOOD[:-1], GOOD + b"\0", GOOD[:10]], ids=["empty", "short", "long", "cut"])
def test_a_wrong_length_is_refused(payload: bytes) -> None:
    with pytest.raises(FormatError, match=f"^layer 7: {len(payload)} bytes, its shape asks for {len(GOOD)}: .*damaged"):
        decode_fixed(payload, *SHAPE, FixedFormat("int4", 64), name="layer 7")


@pytest.mark.parametrize("shape", [(0, 70, 33), (5, 0, 33), (5, 70, 0), (-5, -70, 33)])
def test_sizes_must_be_positive(shape: tuple[int, int, int]) -> None:
    with pytest.raises(FormatError, match="must be 1 or more"):
        decode_fixed(GOOD, *shape, FixedFormat("int4", 64))


@pytest.mark.parametrize("shape", [(2**31, 2**31, 2**31), (1, 2**60, 1), (2**40, 1, 1)])
def test_a_huge_declared_size_costs_nothing(shape: tuple[int, int, int]) -> None:
    tracemalloc.start()
    with pytest.raises(FormatError, match="damaged"):
        decode_fixed(GOOD, *shape, FixedFormat("int4", 64))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


MIXED_PROBLEMS = {
    "none": (None, "bits for 0 components: 5 are needed"),
    "few": ([4, 4], "bits for 2 components: 5 are needed"),
    "seven": ([8, 7, 4, 4, 4], "components of 7 bits: allowed are 2, 3, 4, 5, 6, 8"),
    "zero": ([0] * 5, "components of 0 bits"),
}


@pytest.mark.parametrize(("bits", "message"), MIXED_PROBLEMS.values(), ids=MIXED_PROBLEMS.keys())
def test_mixed_needs_bits_for_every_component(bits: list[int] | None, message: str) -> None:
    form = FixedFormat("mixed", 64)
    for call in (
        lambda: fixed_size(*SHAPE, form, bits),
        lambda: encode_fixed(*factors(), form, bits),
        lambda: decode_fixed(GOOD, *SHAPE, form, bits),
    ):
        with pytest.raises(FormatError, match=message):
            call()


def test_other_codecs_take_no_bits() -> None:
    with pytest.raises(FormatError, match="int4 has the same bits in every component"):
        fixed_size(*SHAPE, FixedFormat("int4", 64), [4] * 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedFormat("int7"), "codec int7: known are int2, int3, int4"),
        (lambda: FixedFormat("int4", 0), "block size 0"),
        (lambda: FixedFormat("int4", 64, scale_dtype=torch.float16), "scales of torch.float16"),
    ],
)
def test_unknown_formats_are_refused(make: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    down, up = factors()
    up[2, 3] = bad
    with pytest.raises(FormatError, match="NaN or infinity"):
        encode_fixed(down, up, FixedFormat("int4", 64))


def test_scales_and_codes_that_are_no_numbers_are_refused() -> None:
    for half in (0x7F80, 0xFF80, 0x7FC1):
        with pytest.raises(FormatError, match="scale that is not finite"):
            decode_fixed(half.to_bytes(2, "little") + GOOD[2:], *SHAPE, FixedFormat("int4", 64))
    form = FixedFormat("fp8", 64)
    for code in (127, 255):
        with pytest.raises(FormatError, match="stands for no number"):
            decode_fixed(encode_fixed(*factors(), form)[:-1] + bytes([code]), *SHAPE, form)


def test_weights_beyond_float16_are_refused_and_read_in_bfloat16() -> None:
    down, up = factors()
    payload = encode_fixed(down * 1e6, up, FixedFormat("int4", 64))
    with pytest.raises(FormatError, match=r"above 65504.*bfloat16 or float32"):
        decode_fixed(payload, *SHAPE, FixedFormat("int4", 64), dtype=torch.float16)
    assert decode_fixed(payload, *SHAPE, FixedFormat("int4", 64), dtype=torch.bfloat16)[0].isfinite().all()


@settings(deadline=None, max_examples=200)
@given(data=st.data(), codec=st.sampled_from([*CODECS, "mixed"]), dtype=st.sampled_from([torch.float16, torch.float32]))
def test_any_bytes_give_finite_weights_or_a_format_error(data: st.DataObject, codec: str, dtype: torch.dtype) -> None:
    form = FixedFormat(codec, 16)
    bits = data.draw(st.lists(st.sampled_from(WIDTHS), min_size=3, max_size=3)) if codec == "mixed" else None
    length = fixed_size(3, 20, 9, form, bits)
    payload = data.draw(st.binary(min_size=length, max_size=length))
    try:
        found = decode_fixed(payload, 3, 20, 9, form, bits, dtype)
    except FormatError:
        return
    assert all(rows.isfinite().all() for rows in found)
