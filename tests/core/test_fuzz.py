"""Wrong files of every layout and codec: one error of ours or a result, in little time and memory.

`LORA_COMPRESS_FUZZ=10000` reads that many; otherwise a share of them is read.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from core.fresh_process import worker
from core.fuzz_worker import MEMORY
from core.mutations import mutate, pack, unpack
from core.samples import CODECS, kohya_file, packed_file
from safetensors.torch import save_file

from lora_compress import open_lora

COUNT = int(os.environ.get("LORA_COMPRESS_FUZZ", "1000"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc and limits address space")
def test_wrong_files_are_refused_or_read(tmp_path: Path) -> None:
    """Seeds are fixed: what failed once fails again. The worker says which file it was and keeps it."""
    print(worker("core.fuzz_worker", str(tmp_path), str(COUNT), "0"))


def filled(item: str, size: int) -> bytes:
    """A list in JSON, `size` bytes at most."""
    return b'{"a":[' + ",".join([item] * ((size - 8) // (len(item.encode()) + 1))).encode() + b"]}"


EMPTY = '"%d":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'


def refused() -> list[bytes]:
    """Headers that are too large, by their bytes or by their values, to be parsed at all."""
    tensors = "{" + ",".join(EMPTY % i for i in range(400_000)) + "}"
    text = b'{"__metadata__":{"a":"' + b"a" * 100_000_000 + b'"}}'
    return [tensors.encode(), text, *(filled(item, 1 << 24) for item in ('{"":0}', "-6", r'"\\"'))]


def parsed() -> list[bytes]:
    """As large as is allowed, with a character for which Python needs four bytes in place of one."""
    text = '{"__metadata__":{"a":"\U0001f600' + "a" * (100_000_000 - 40) + '"}}'
    return [text.encode(), *(filled(item, 1 << 20) for item in ('{"":0}', "-6", r'"\\"'))]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc and limits address space")
def test_a_hostile_header_takes_no_memory(tmp_path: Path) -> None:
    """One error, of little memory if it is too large; 0.9 GB for the largest text that is allowed, four bytes a character."""
    headers, large = [*refused(), *parsed()], len(refused())
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(headers) + 1)]
    for path, text in zip(paths, headers, strict=False):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
    modules = {f"lora_unet_{i}.lora_{side}.weight": torch.ones(1, 1).half() for i in range(20_000) for side in ("down", "up")}
    save_file(modules, paths[-1])
    results = json.loads(worker("core.header_worker", *map(str, paths)))
    for (megabytes, told), path in zip(results, paths, strict=True):
        allowed = 900 if path.stat().st_size > 90_000_000 else MEMORY / 1e6
        assert megabytes <= allowed, (path.name, megabytes, told)
    assert all("allowed: " in told and "it is no LoRA" in told and megabytes < 120 for megabytes, told in results[:large])
    assert all("allowed: " not in told for _, told in results[large:])
    assert results[-1][1] == "opened"
    print(results)


def test_mutations_are_what_they_claim(tmp_path: Path) -> None:
    """A packed file taken apart and put together reads the same; nearly every mutation makes another file."""
    source = kohya_file(tmp_path / "source.safetensors", count=3, width=24, rank=6)
    for codec in CODECS:
        good = packed_file(codec, source, tmp_path / "good.safetensors")
        data = good.read_bytes()
        again = tmp_path / "again.safetensors"
        again.write_bytes(pack(*unpack(data)))
        before, after = open_lora(good), open_lora(again)
        assert [*before] == [*after]
        assert all((before[name].down == after[name].down).all() for name in before)
        assert sum(mutate(data, random.Random(seed)) != data for seed in range(60)) > 50
