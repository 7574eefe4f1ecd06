"""Symbols through the stack: what is written is read, by constriction and by the loop that numba compiles, alike on any bytes."""

from __future__ import annotations

import numpy as np
import pytest
from core.quantization.gaussian_modules import module
from hypothesis import given
from hypothesis import strategies as st

from lora_compress.errors import FormatError
from lora_compress.quantization import ans_jit
from lora_compress.quantization.ans import AnsReader, AnsWriter, uniform
from lora_compress.quantization.ans_jit import JitDecoder
from lora_compress.quantization.entropy import decode_entropy, encode_entropy
from lora_compress.quantization.tables import base_counts

_TABLES = [(uniform, 2), (uniform, 256), (base_counts, 3, 0, 0), (base_counts, 30, 2, 0), (base_counts, 40, 1, 2)]


def _reader(chunk: bytes) -> AnsReader:
    """One that reads with the loop, as it stands."""
    reader = AnsReader(chunk)
    words = np.frombuffer(chunk + bytes(-len(chunk) % 4), dtype="<u4").astype(np.uint32)
    reader._coder, reader._model_of = JitDecoder(words, ans_jit._decode), ans_jit.symbol_table
    return reader


@given(st.lists(st.tuples(st.sampled_from(_TABLES), st.integers(0, 60), st.integers(0, 2**32 - 1)), max_size=6))
def test_both_read_what_was_written(runs: list[tuple[tuple, int, int]]) -> None:
    writer = AnsWriter()
    written = []
    for (counts_of, *key), count, seed in runs:
        symbols = np.random.default_rng(seed).integers(0, len(counts_of(*key)), count)
        written.append((symbols, counts_of, key))
        writer.write(symbols, counts_of, *key)
    chunk = writer.to_bytes()
    for reader in (AnsReader(chunk), _reader(chunk)):
        for symbols, counts_of, key in written:
            found = reader.read(len(symbols), counts_of, *key)
            assert found.dtype == np.int32 and (found == symbols).all()
        reader.finish()


@given(st.binary(max_size=40), st.lists(st.tuples(st.sampled_from(_TABLES), st.integers(0, 30)), max_size=6))
def test_both_make_the_same_of_any_bytes(chunk: bytes, runs: list[tuple[tuple, int]]) -> None:
    if chunk and not chunk[-1]:
        with pytest.raises(FormatError, match="ends in a zero byte"):
            AnsReader(chunk)
        return
    one, other = AnsReader(chunk), _reader(chunk)
    for (counts_of, *key), count in runs:
        assert one.read(count, counts_of, *key).tolist() == other.read(count, counts_of, *key).tolist()
    assert one._coder.is_empty() == other._coder.is_empty()


@pytest.mark.parametrize("layers", [1, 5])
def test_the_compiled_loop_takes_over_where_there_is_much_to_read(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    encoded = encode_entropy(*module(8, 320, 640, lambda i: 1 / i), 0.003, layers=layers, refine=False)
    arguments = (encoded.chunks, encoded.rank, 320, 640, 0.003, layers)
    monkeypatch.setattr(AnsReader, "_symbols_read", 0)
    plain = decode_entropy(*arguments)
    assert isinstance(AnsReader(encoded.chunks[0])._coder, JitDecoder) is False
    monkeypatch.setattr(AnsReader, "_symbols_read", 1 << 30)
    assert isinstance(AnsReader(encoded.chunks[0])._coder, JitDecoder)
    for rows, found in zip(plain, decode_entropy(*arguments), strict=True):
        assert rows.equal(found)
    with pytest.raises(FormatError):
        decode_entropy([encoded.chunks[0][:-9] + b"x", *encoded.chunks[1:]], *arguments[1:])
