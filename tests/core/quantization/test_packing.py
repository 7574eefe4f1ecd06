"""Packing: the string of bits that the docstring promises, and back, for every width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_compress.quantization import WIDTHS, pack_bits, packed_width, unpack_bits


def in_words(codes: Tensor, bits: int) -> list[list[int]]:
    """Bytes of each row by the definition: its codes as text of ones and zeros, cut every 8."""
    texts = ["".join(f"{code:0{bits}b}" for code in row) for row in codes.tolist()]
    texts = [text + "0" * (-len(text) % 8) for text in texts]
    return [[int(text[i : i + 8], 2) for i in range(0, len(text), 8)] for text in texts]


@settings(deadline=None)
@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 4), count=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_packing_is_a_string_of_bits_and_undoes_itself(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(count, bits))
    assert packed.tolist() == in_words(codes, bits)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_whatever_fills_the_last_byte_is_ignored(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)[None, -5:]
    packed = pack_bits(codes, bits)
    spare = packed_width(codes.shape[1], bits) * 8 - codes.shape[1] * bits
    packed[:, -1] |= (1 << spare) - 1
    assert torch.equal(unpack_bits(packed, bits, codes.shape[1]), codes)


def test_the_first_code_lies_in_the_high_bits() -> None:
    assert pack_bits(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[0x12, 0xF0]]
    assert pack_bits(torch.tensor([[5, 1, 7]], dtype=torch.uint8), 3).tolist() == [[0b10100111, 0b10000000]]


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16])
def test_other_widths_are_refused(bits: int) -> None:
    for function in (lambda codes: pack_bits(codes, bits), lambda codes: unpack_bits(codes, bits, 1)):
        with pytest.raises(ValueError, match=f"{bits} bits.*2, 3, 4, 5, 6, 8 can"):
            function(torch.zeros(1, 1, dtype=torch.uint8))
