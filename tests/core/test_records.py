"""Records: what goes in comes out, rows can be cut off, damage is named."""

from __future__ import annotations

import struct

import pytest
import torch
from core.factories import random_update
from torch import Tensor

from lora_compress import FormatError, QuantizationSettings, thin_svd
from lora_compress.quantization import CODECS
from lora_compress.records import decode_record, encode_record, record_size

HEADER = 32
ALL = [
    QuantizationSettings(8),
    QuantizationSettings(4, group_size=16),
    QuantizationSettings(4, group_size=1024),
    QuantizationSettings(4, "nf4"),
    QuantizationSettings(8, "static"),
    QuantizationSettings(4, "static", scale=0.01),
]
LAYERS = {
    "linear": {"inputs": 70, "outputs": 33},
    "odd": {"inputs": 1, "outputs": 3},
    "convolution": {"inputs": 7, "outputs": 65, "kernel": (3, 3)},
    "1x1": {"inputs": 64, "outputs": 64, "kernel": (1, 1)},
    "3d": {"inputs": 2, "outputs": 5, "kernel": (2, 3, 1)},
}
settings_cases = pytest.mark.parametrize("settings", ALL, ids=lambda s: f"{s.codec_name}-{s.strategy}-{s.group_size}")
layer_cases = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def make(settings: QuantizationSettings, rank: int = 5, **layer: object) -> Tensor:
    spectrum = thin_svd(random_update(rank=5, **layer))  # type: ignore[arg-type]
    return encode_record(spectrum, min(rank, len(spectrum.sigma)), settings)


@settings_cases
@layer_cases
def test_decoding_gives_what_the_codec_gives(settings: QuantizationSettings, layer: dict[str, object]) -> None:
    spectrum = thin_svd(random_update(rank=5, **layer))  # type: ignore[arg-type]
    rank = min(4, len(spectrum.sigma))
    codec = CODECS[settings.codec_name]
    down, up = (
        codec.decode(*codec.encode(rows, settings.block_size, settings.static_scale), settings.block_size)
        for rows in spectrum.balanced(rank)
    )
    update = decode_record(encode_record(spectrum, rank, settings))
    assert torch.equal(update.down.flatten(1), down)
    assert torch.equal(update.up.flatten(1), up.T)
    kernel = layer.get("kernel", ())
    assert update.down.shape == (rank, layer["inputs"], *kernel)  # type: ignore[misc]
    assert update.up.shape == (layer["outputs"], rank, *[1] * len(kernel))  # type: ignore[arg-type]
    assert update.alpha == rank
    assert update.down.dtype == update.up.dtype == torch.float32


@settings_cases
@layer_cases
def test_size_is_known_beforehand(settings: QuantizationSettings, layer: dict[str, object]) -> None:
    record = make(settings, **layer)
    rank = struct.unpack_from("<I", bytes(record.tolist()), 8)[0]
    inputs = layer["inputs"] * torch.Size(layer.get("kernel", ())).numel()  # type: ignore[operator, arg-type]
    assert len(record) == record_size(inputs, layer["outputs"], rank, settings)  # type: ignore[arg-type]


@settings_cases
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_cutting_components_off_the_end_gives_the_record_of_the_smaller_rank(settings: QuantizationSettings, rank: int) -> None:
    whole = make(settings, **LAYERS["convolution"])
    row = (len(whole) - HEADER) // 5
    cut = whole[: HEADER + rank * row].clone()
    cut[8:12] = torch.tensor([rank, 0, 0, 0])
    assert torch.equal(cut, make(settings, rank=rank, **LAYERS["convolution"]))
    full, less = decode_record(whole), decode_record(cut)
    assert torch.equal(less.down, full.down[:rank])
    assert torch.equal(less.up, full.up[:, :rank])


@settings_cases
def test_encoding_and_decoding_repeat_exactly(settings: QuantizationSettings) -> None:
    first, second = make(settings, **LAYERS["linear"]), make(settings, **LAYERS["linear"])
    assert torch.equal(first, second)
    assert torch.equal(decode_record(first).down, decode_record(second).down)


def patched(offset: int, value: int, length: int = 1) -> Tensor:
    record = make(QuantizationSettings(4), **LAYERS["convolution"])
    record[offset : offset + length] = torch.tensor(list(value.to_bytes(length, "little")), dtype=torch.uint8)
    return record


GOOD = make(QuantizationSettings(4), **LAYERS["convolution"])
DAMAGED = {
    "magic": (patched(0, ord("X")), r"begins with b'XC'.*b'LC'"),
    "version": (patched(2, 2), "record version 2.* reads 1: update"),
    "codec": (patched(3, 99), "codec 99.*update"),
    "scale type": (patched(4, 7), "scale type 7.*update"),
    "kernel dimensions": (patched(5, 4), "kernel of 4 dimensions.* 3"),
    "block size": (patched(6, 3, 2), "bytes, its header asks for.*damaged"),
    "rank 0": (patched(8, 0, 4), "damaged"),
    "huge rank": (patched(8, 2**32 - 1, 4), "damaged"),
    "out 0": (patched(12, 0, 4), "damaged"),
    "in 0": (patched(16, 0, 4), "damaged"),
    "kernel 0": (patched(20, 0, 2), "damaged"),
    "one byte short": (GOOD[:-1], "damaged"),
    "one byte long": (torch.cat([GOOD, GOOD[:1]]), "damaged"),
    "header alone": (GOOD[:HEADER], "damaged"),
    "half a header": (GOOD[:10], r"found torch.uint8 \(10,\).*at least 32 bytes"),
    "empty": (GOOD[:0], "at least 32 bytes"),
    "dtype": (GOOD.to(torch.int8), "found torch.int8"),
    "shape": (GOOD.unsqueeze(0), r"found torch.uint8 \(1, "),
}


@pytest.mark.parametrize(("record", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_named_with_its_key(record: Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=f"^lora_unet_x.lora_compress: .*{message}"):
        decode_record(record, "lora_unet_x.lora_compress")


@pytest.mark.parametrize(("offset", "length"), [(8, 4), (12, 4), (16, 4), (20, 2)], ids=["rank", "out", "in", "kernel"])
def test_a_header_without_weights_is_refused_also_where_the_length_fits(offset: int, length: int) -> None:
    header = bytearray(GOOD[:HEADER].tolist())
    header[offset : offset + length] = bytes(length)
    for rows in range(600):  # whatever length the header asks for is among these
        with pytest.raises(FormatError, match=r"^m: .*damaged"):
            decode_record(torch.frombuffer(header + bytes(rows), dtype=torch.uint8), "m")


def test_float32_scales_are_read_too() -> None:
    record = make(QuantizationSettings(4, group_size=64), **LAYERS["linear"])
    rows = record[HEADER:].reshape(5, -1)
    scales = rows[:, :6].contiguous().view(torch.bfloat16).float()  # two blocks of down, one of up
    wider = torch.cat([scales.view(torch.uint8), rows[:, 6:]], dim=1)
    header = record[:HEADER].clone()
    header[4] = 1
    assert torch.equal(decode_record(torch.cat([header, wider.flatten()])).down, decode_record(record).down)
