"""Chunks that wait on disk: the bytes that were kept, in any order, and an error of ours where the folder cannot take them."""

from __future__ import annotations

import random
import warnings
import zlib
from pathlib import Path

import pytest

from lora_compress import SaveError
from lora_compress.packed.chunks import Chunk, Spool, payload_tensor


def test_what_is_kept_reads_the_same_in_any_order(tmp_path: Path) -> None:
    roll = random.Random(0)
    data = [roll.randbytes(roll.randrange(0, 5000)) for _ in range(50)]
    spool = Spool(tmp_path)
    chunks = [spool.keep(Chunk.of(piece)) for piece in data]
    assert [(len(chunk), chunk.crc32) for chunk in chunks] == [(len(piece), zlib.crc32(piece)) for piece in data]
    order = roll.sample(range(50), 50)
    wanted = b"".join(data[place] for place in order)
    for target in (None, Spool(tmp_path)):
        assert payload_tensor([chunks[place] for place in order], target).numpy().tobytes() == wanted
    assert not len(payload_tensor([])) and not len(payload_tensor([], Spool(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"gone: cannot be written \(.*\): free disk space or choose another output folder"):
        Spool(tmp_path / "gone")


def test_a_spool_that_nobody_needs_closes_its_file(tmp_path: Path) -> None:
    """Python would warn, and the command line would tell the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spool = Spool(tmp_path)
        kept = spool.keep(Chunk.of(b"bytes"))
        file = spool._file
        del spool
        assert not file.closed and kept.read() == b"bytes"
        del kept
        assert file.closed
