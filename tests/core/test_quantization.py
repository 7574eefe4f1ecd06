"""The codecs: known error on Gaussian weights, nearest grid points, invariances, and bitsandbytes' NF4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_compress.quantization import CODECS, Codec, pack_bits

CODEC_NAMES = tuple(CODECS)
INTEGERS = ("int2", "int3", "int4", "int5", "int6", "int8")


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
        ("int6", 64, 0.0243),
        ("int5", 64, 0.0502),
        ("int4", 32, 0.0860),
        ("int4", 64, 0.0948),
        ("int4", 128, 0.1010),
        ("int3", 64, 0.1896),
        ("int2", 64, 0.3781),
        ("fp8", 64, 0.0265),
        ("nf4", 32, 0.0873),
        ("nf4", 64, 0.0920),
        ("nf4", 128, 0.0956),
    ],
)
def test_error_on_gaussian_weights_is_the_known_one(name: str, block_size: int, published: float) -> None:
    rows = gaussian(256, 1024)
    found = relative_rms(round_trip(CODECS[name], rows, block_size), rows)
    assert 0.89 * published < found < 1.01 * published


@pytest.mark.parametrize("width", [1, 5, 32, 63, 100, 640])
@pytest.mark.parametrize("block_size", [None, 16, 32, 64, 256])
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_decoded_weights_encode_to_themselves(name: str, block_size: int | None, width: int) -> None:
    for heavy in (False, True):
        rows = gaussian(24, width, seed=width)
        once = round_trip(CODECS[name], rows**3 if heavy else rows, block_size)
        assert torch.equal(round_trip(CODECS[name], once, block_size), once)


@pytest.mark.parametrize("block_size", [None, 32, 64])
@pytest.mark.parametrize("name", INTEGERS)
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
@pytest.mark.parametrize("name", INTEGERS)
def test_searched_scale_beats_absmax(name: str, power: int) -> None:
    codec = CODECS[name]
    rows = gaussian(64, 64) ** power
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (codec.bits - 1) - 1)
    assert relative_rms(round_trip(codec, rows, 64), rows) < relative_rms((rows / step).round() * step, rows)


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("width", [16, 64, 256, 2048])
@pytest.mark.parametrize("name", INTEGERS)
def test_searched_scale_is_as_good_as_a_dense_search(name: str, width: int, power: int) -> None:
    codec = CODECS[name]
    rows = gaussian(8192 // width, width, seed=width) ** power
    found = relative_rms(round_trip(codec, rows, width), rows)
    # in tiny blocks a fine grid that leaves several of its steps unused can be better; the search does not look so far
    slack = 1.01 if codec.bits <= 4 else 1.02 if width > 16 else 1.08
    assert found <= slack * relative_rms(densely_searched(rows.double(), codec.bits), rows)


def densely_searched(rows: Tensor, bits: int) -> Tensor:
    """Rows on the best of 1,200 grids of both signs, in float64; what a scale rounded to bfloat16 can miss is not held back."""
    half = 2 ** (bits - 1)
    largest = rows.abs().amax(dim=1, keepdim=True)
    best, least = rows, torch.full_like(largest, float("inf"))
    for place in range(600):
        for sign in (1, -1):
            step = sign * largest / (half * 0.7 * 1.004**place)
            trial = (rows / step).round().clamp(-half, half - 1) * step
            error = (trial - rows).square().sum(dim=1, keepdim=True)
            best, least = torch.where(error < least, trial, best), torch.minimum(error, least)
    return best


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
    precision = 3 if name == "fp8" else codec.bits  # the bits of its mantissa
    assert float(shaken[1, 40]) == pytest.approx(1e6, rel=2.0**-precision + 2.0**-8)
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
@pytest.mark.parametrize("name", INTEGERS)
def test_static_step_is_scale_times_rms_and_at_most_the_best_step(name: str, scale: float) -> None:
    bits = CODECS[name].bits
    rows = gaussian(12, 200)
    rows[::2] = rows[::2] ** 5  # outliers: the best step is a large one
    step = CODECS[name].encode(rows, None, scale)[1].double().squeeze(1).abs()
    asked = rows.double().square().mean(dim=1).sqrt() * scale * 2 ** (8 - bits)
    best = CODECS[name].encode(rows, None)[1].double().squeeze(1).abs()
    torch.testing.assert_close(step, torch.minimum(asked, best), rtol=2.0**-8, atol=0)
    assert torch.equal(step[asked > best], best[asked > best])


def test_fp8_reaches_e4m3s_largest_number_and_no_further() -> None:
    rows = gaussian(64, 64) * torch.logspace(-30, 30, 64).unsqueeze(1)
    rows[:, 0] = 448.0 * 2.0 ** torch.arange(-32, 32)  # fits a power of two exactly
    codes, scales = CODECS["fp8"].encode(rows, 32)
    ratio = rows.unflatten(1, (2, 32)).abs().amax(dim=2) / scales.float()
    assert ((ratio > 224.0) & (ratio <= 448.0)).all()
    assert torch.equal(torch.frexp(scales.float())[0], torch.full_like(ratio, 0.5))
    expected = (rows.unflatten(1, (2, 32)) / scales.float().unsqueeze(2)).to(
        torch.float8_e4m3fn
    ).float() * scales.float().unsqueeze(2)
    assert torch.equal(CODECS["fp8"].decode(codes, scales, 32), expected.flatten(1))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_given_scales_are_kept(name: str) -> None:
    rows = gaussian(300, 300)  # several chunks
    scales = gaussian(300, 5, seed=1).abs() + 0.5
    codes, stored = CODECS[name].encode(rows, 64, scale_dtype=torch.float32, scales=scales)
    assert torch.equal(stored, scales)
    pieces = [CODECS[name].encode(rows[i : i + 1], 64, scale_dtype=torch.float32, scales=scales[i : i + 1])[0] for i in range(300)]
    assert torch.equal(codes, torch.cat(pieces))


@pytest.mark.parametrize("name", INTEGERS)
def test_scales_in_float32_are_no_worse(name: str) -> None:
    rows = gaussian(64, 256)
    codes, scales = CODECS[name].encode(rows, 64, scale_dtype=torch.float32)
    assert scales.dtype == torch.float32
    wide = relative_rms(CODECS[name].decode(codes, scales, 64), rows)
    assert wide < 1.002 * relative_rms(round_trip(CODECS[name], rows, 64), rows)


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
