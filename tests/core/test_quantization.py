"""The codecs: known error on Gaussian weights, nearest grid points, invariances, and bitsandbytes' NF4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_compress.quantization import CODECS, Codec, pack_bits, packed_width, unpack_bits

CODEC_NAMES = ("int8", "int4", "nf4")


def gaussian(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def round_trip(codec: Codec, rows: Tensor, block_size: int | None, static_scale: float | None = None) -> Tensor:
    return codec.decode(*codec.encode(rows, block_size, static_scale), block_size)


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("name", "block_size", "published"),  # relative RMS on Gaussian weights; int4 with a searched scale, int8 by absmax
    [
        ("int8", 64, 0.0059),
        ("int8", 128, 0.0065),
        ("int4", 32, 0.0860),
        ("int4", 64, 0.0948),
        ("int4", 128, 0.1010),
        ("nf4", 32, 0.0873),
        ("nf4", 64, 0.0920),
        ("nf4", 128, 0.0956),
    ],
)
def test_error_on_gaussian_weights_is_the_known_one(name: str, block_size: int, published: float) -> None:
    rows = gaussian(256, 1024)
    found = relative_rms(round_trip(CODECS[name], rows, block_size), rows)
    assert 0.93 * published < found < 1.01 * published


@pytest.mark.parametrize("width", [1, 5, 32, 63, 100, 640])
@pytest.mark.parametrize("block_size", [None, 16, 32, 64, 256])
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_decoded_weights_encode_to_themselves(name: str, block_size: int | None, width: int) -> None:
    for heavy in (False, True):
        rows = gaussian(24, width, seed=width)
        once = round_trip(CODECS[name], rows**3 if heavy else rows, block_size)
        assert torch.equal(round_trip(CODECS[name], once, block_size), once)


@pytest.mark.parametrize("block_size", [None, 32, 64])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integer_codes_are_the_nearest_points_of_the_stored_grid(name: str, block_size: int | None) -> None:
    codec = CODECS[name]
    rows = gaussian(6, 100)
    codes, scales = codec.encode(rows, block_size)
    spread = scales.double().repeat_interleave(block_size or 100, dim=1)[:, :100]
    grid = torch.tensor(codec.levels).double() * spread.unsqueeze(2)  # (r, n, levels)
    nearest = (grid - rows.double().unsqueeze(2)).abs().amin(dim=2)
    found = (codec.decode(codes, scales, block_size).double() - rows.double()).abs()
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_searched_scale_beats_absmax(name: str, power: int) -> None:
    codec = CODECS[name]
    rows = gaussian(64, 64) ** power
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (codec.bits - 1) - 1)
    assert relative_rms(round_trip(codec, rows, 64), rows) < relative_rms((rows / step).round() * step, rows)


@pytest.mark.parametrize("block_size", [None, 32])
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_zeros_stay_exact_zeros(name: str, block_size: int | None) -> None:
    rows = gaussian(4, 96)
    rows[1] = 0.0
    rows[2, 32:64] = 0.0
    decoded = round_trip(CODECS[name], rows, block_size)
    assert (decoded[1] == 0).all()
    if block_size:
        assert (decoded[2, 32:64] == 0).all()
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_an_outlier_harms_its_own_block_only(name: str) -> None:
    codec = CODECS[name]
    rows = gaussian(3, 128)
    wild = rows.clone()
    wild[1, 40] = 1e6
    calm, shaken = round_trip(codec, rows, 32), round_trip(codec, wild, 32)
    assert float(shaken[1, 40]) == pytest.approx(1e6, rel=2.0**-codec.bits + 2.0**-8)
    harmed = torch.zeros_like(rows, dtype=torch.bool)
    harmed[1, 32:64] = True
    assert torch.equal(calm[~harmed], shaken[~harmed])


@pytest.mark.parametrize("exponent", [-90, -40, 40, 90])
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_error_does_not_depend_on_magnitude(name: str, exponent: int) -> None:
    codec = CODECS[name]
    rows = gaussian(8, 100)
    codes, scales = codec.encode(rows, 32)
    scaled_codes, scaled_scales = codec.encode(rows * 2.0**exponent, 32)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(scales.float() * 2.0**exponent, scaled_scales.float())


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_subnormal_weights_become_zeros_not_noise(name: str) -> None:
    rows = gaussian(4, 32) * 1e-40
    decoded = round_trip(CODECS[name], rows, 32)
    assert float(decoded.abs().amax()) <= float(rows.abs().amax()) * 1.01


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_row_does_not_depend_on_the_rows_below(name: str) -> None:
    rows = gaussian(9, 77)
    codes, scales = CODECS[name].encode(rows, 32)
    fewer_codes, fewer_scales = CODECS[name].encode(rows[:4], 32)
    assert torch.equal(codes[:4], fewer_codes)
    assert torch.equal(scales[:4], fewer_scales)


@pytest.mark.parametrize("width", [1, 31, 33, 95])
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_the_last_block_of_a_row_is_short(name: str, width: int) -> None:
    codec = CODECS[name]
    rows = gaussian(3, width)
    codes, scales = codec.encode(rows, 32)
    assert codes.shape == (3, width)
    assert scales.shape == (3, -(-width // 32))
    pieces = [round_trip(codec, piece, None) for piece in rows.split(32, dim=1)]
    assert torch.equal(codec.decode(codes, scales, 32), torch.cat(pieces, dim=1))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_block_larger_than_the_row_is_the_row(name: str) -> None:
    rows = gaussian(3, 50)
    assert torch.equal(round_trip(CODECS[name], rows, 1024), round_trip(CODECS[name], rows, None))


@pytest.mark.parametrize("scale", [0.002, 0.01, 0.0625, 0.25, 3.0])
@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_static_step_is_scale_times_rms_and_at_most_the_best_step(name: str, bits: int, scale: float) -> None:
    rows = gaussian(12, 200)
    rows[::2] = rows[::2] ** 5  # outliers: the best step is a large one
    step = CODECS[name].encode(rows, None, scale)[1].double().squeeze(1).abs()
    asked = rows.double().square().mean(dim=1).sqrt() * scale * 2 ** (8 - bits)
    best = CODECS[name].encode(rows, None)[1].double().squeeze(1).abs()
    torch.testing.assert_close(step, torch.minimum(asked, best), rtol=2.0**-8, atol=0)
    assert torch.equal(step[asked > best], best[asked > best])


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_undoes_itself(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (5, count), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, packed_width(count, bits))
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_packing_puts_the_first_code_in_the_high_bits() -> None:
    assert pack_bits(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[0x12, 0xF0]]
    for function in (lambda codes: pack_bits(codes, 3), lambda codes: unpack_bits(codes, 3, 1)):
        with pytest.raises(ValueError, match="3 bits"):
            function(torch.zeros(1, 1, dtype=torch.uint8))


@pytest.mark.parametrize("width", [320, 33, 100, 768])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
def test_nf4_is_that_of_bitsandbytes(block_size: int, width: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codec = CODECS["nf4"]
    rows = gaussian(7, width, seed=width) ** 3
    rows[3, :32] = 0.0
    padded_width = -(-width // block_size) * block_size
    padded = torch.nn.functional.pad(rows, (0, padded_width - width))
    theirs, _ = functional.quantize_4bit(padded.flatten(), blocksize=block_size, quant_type="nf4")
    codes, scales = codec.encode(padded, block_size)
    packed = pack_bits(codes, 4)
    assert torch.equal(packed.flatten(), theirs.flatten())
    assert torch.equal(codec.encode(rows, block_size)[0], codes[:, :width])  # without the padding, the same

    state = functional.QuantState(
        absmax=scales.float().flatten(),
        shape=torch.Size([padded.numel()]),
        code=torch.tensor(codec.levels),
        blocksize=block_size,
        quant_type="nf4",
        dtype=torch.float32,
    )
    dequantized = functional.dequantize_4bit(packed.reshape(-1, 1), state).reshape(padded.shape)
    assert torch.equal(dequantized, codec.decode(codes, scales, block_size))
