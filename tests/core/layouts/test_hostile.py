"""Damaged and hostile files: one FormatError or a correct update, never another exception, never memory they do not hold."""

from __future__ import annotations

import json
import random as chance
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from core.layouts.files import PAIRS, random, save

from lora_compress import FormatError
from lora_compress.sources.open import open_lora

ROOT = Path(__file__).resolve().parents[3]


def everything() -> dict[str, torch.Tensor]:
    """A little of each layout."""
    tensors = {}
    for index, (_, down, up) in enumerate(PAIRS.values()):
        tensors[f"m{index}{down}"], tensors[f"m{index}{up}"] = random(2, 3, seed=index), random(4, 2, seed=index + 20)
        tensors[f"m{index}.alpha"] = torch.tensor(1.0)
    for part, shape in {"hada_w1_a": (4, 2), "hada_w1_b": (2, 3), "hada_w2_a": (4, 2), "hada_w2_b": (2, 3)}.items():
        tensors[f"h.{part}"] = random(*shape)
    for part, shape in {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 3)}.items():
        tensors[f"k.{part}"] = random(*shape)
    for part, shape in {"lora_down": (2, 3, 1, 1), "lora_mid": (2, 2, 3, 3), "lora_up": (4, 2, 1, 1)}.items():
        tensors[f"c.{part}.weight"] = random(*shape)
    for part, shape in {"a1": (3, 2), "a2": (2, 3), "b1": (4, 2), "b2": (2, 3)}.items():
        tensors[f"g.{part}.weight"] = random(*shape) * (part != "a2")
    return tensors | {"f.diff": random(4, 3), "f.diff_b": random(4), "m0.dora_scale": random(4, 1), "emb": random(3)}


def read_all(path: Path, repair: bool) -> None:
    """Every public reader of a file; whatever is not a FormatError is a defect."""
    try:
        with open_lora(path, repair) as source:
            for name in source:
                try:
                    update = source[name]
                except FormatError:
                    continue
                shape = source.shapes[name]
                assert tuple(update.down.shape[1:]) == (shape.inputs, *shape.kernel)
                assert update.up.shape[0] == shape.outputs
                assert update.rank <= shape.rank
                assert source.factor_bytes(name) <= path.stat().st_size
                source.extras(name)
            for key in source.others:
                source.others[key]
            source.plain_metadata(dict.fromkeys(source, 1))
    except FormatError as error:
        assert str(path) in str(error)


def header_of(data: bytes) -> tuple[dict[str, object], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file_of(header: dict[str, object], payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + payload


def mutate(data: bytes, roll: chance.Random) -> bytes:
    """Bytes flipped, a file cut short or lengthened, or a header that lies in a well-formed way."""
    kind = roll.randrange(6)
    if kind == 0:
        return data[: roll.randrange(len(data))]
    if kind == 1:
        return data + roll.randbytes(roll.randrange(1, 40))
    if kind == 2:
        changed = bytearray(data)
        for _ in range(roll.randrange(1, 6)):
            changed[roll.randrange(len(changed))] = roll.randrange(256)
        return bytes(changed)
    header, payload = header_of(data)
    names = [key for key in header if key != "__metadata__"]
    for _ in range(roll.randrange(1, 4)):
        entry, other = header[roll.choice(names)], header[roll.choice(names)]
        assert isinstance(entry, dict) and isinstance(other, dict)
        if kind == 3:  # another shape of the same size, with ones, zeros and absurd numbers
            size = roll.choice(
                [[1, 1], [2, 2], [6], [], [6, 1, 1], [1, 1, 6], [0, 2**40], [2**31, 2**31], [3, 2, 1, 1, 1, 1], [-1, -6]]
            )
            entry["shape"] = size
        elif kind == 4:
            entry["dtype"] = roll.choice(["F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "X"])
            shape, width = list(entry["shape"]), {"F64": 2, "I64": 2}.get(entry["dtype"], 4)
            if shape and entry["dtype"] in ("F16", "BF16"):
                entry["shape"] = [*shape[:-1], shape[-1] * 2]
            elif shape and width == 4:
                entry["shape"] = [*shape[:-1], shape[-1] * 4]
        else:
            entry["shape"], other["shape"] = other["shape"], entry["shape"]
            entry["dtype"], other["dtype"] = other["dtype"], entry["dtype"]
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    return file_of(header, payload)


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    config = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 4, "alpha_pattern": {"m1": 2}})}
    data = save(everything(), tmp_path, config).read_bytes()
    roll = chance.Random(0)
    for index in range(600):
        path = tmp_path / f"{index}.safetensors"
        path.write_bytes(mutate(data, roll))
        read_all(path, repair=bool(index % 2))
        path.unlink()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_refused_or_read(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "lora.pt"
    torch.save(everything(), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    roll = chance.Random(1)
    for index in range(100):
        changed = bytearray(data[: roll.randrange(len(data))] if index % 3 == 0 else data)
        for _ in range(roll.randrange(1, 8)):
            if changed:
                changed[roll.randrange(len(changed))] = roll.randrange(256)
        path.write_bytes(changed)
        read_all(path, repair=bool(index % 2))


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 64, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{}"])
def test_files_of_nothing_are_refused(data: bytes, tmp_path: Path) -> None:
    for suffix in (".safetensors", ".pt"):
        path = tmp_path / f"lora{suffix}"
        path.write_bytes(data)
        with pytest.raises(FormatError, match=f"lora{suffix}: "):
            open_lora(path)


def absurd(name: str) -> dict[str, torch.Tensor]:
    """Small files whose updates would be gigantic."""
    long = torch.zeros(200_000)
    return {
        "LoHa": {
            f"m.hada_w{i}_{side}": long.reshape(-1, 1) if side == "a" else long.reshape(1, -1) for i in (1, 2) for side in "ab"
        },
        "LoHa of many ranks": {
            f"m.hada_w{i}_{side}": torch.zeros(20_000, 120) if side == "a" else torch.zeros(120, 20_000)
            for i in (1, 2)
            for side in "ab"
        },
        "LoHa cores": {
            **{f"m.hada_w{i}_{side}": torch.zeros(1, 30_000) for i in (1, 2) for side in "ab"},
            **{f"m.hada_t{i}": torch.zeros(1, 1, 300, 300) for i in (1, 2)},
        },
        "LoKr": {"m.lokr_w1": torch.zeros(300, 300), "m.lokr_w2": torch.zeros(300, 300)},
        "LoKr of products": {
            "m.lokr_w1": torch.zeros(1, 1),
            "m.lokr_w2_a": long.reshape(-1, 1).repeat(1, 9)[:, :9],
            "m.lokr_w2_b": long.reshape(1, -1).repeat(9, 1),
        },
        "mid": {
            "m.lora_down.weight": torch.zeros(1, 50_000),
            "m.lora_mid.weight": torch.zeros(1, 1, 300, 300),
            "m.lora_up.weight": torch.zeros(3, 1),
        },
    }[name]


@pytest.mark.parametrize("name", ["LoHa", "LoHa of many ranks", "LoHa cores", "LoKr", "LoKr of products", "mid"])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on address space")
def test_small_files_of_gigantic_updates_do_not_exhaust_memory(name: str, tmp_path: Path) -> None:
    """Read in a process of 3 GB of address space beyond what importing takes."""
    path = save(absurd(name), tmp_path)
    code = f"""
import resource, torch
from lora_compress.sources.open import open_lora
from lora_compress import FormatError
torch.set_num_threads(1)
now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() if __import__('os').path.exists('/proc') else 8 << 30
resource.setrlimit(resource.RLIMIT_AS, (now + (3 << 30),) * 2)
try:
    source = open_lora({str(path)!r})
    source["m"]
    print("read")
except FormatError as error:
    print("refused", error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(("refused", "read"))


def test_many_patterns_adapters_and_endings_take_no_time(tmp_path: Path) -> None:
    """Work grows with the file and not with its square; these would take minutes if it did."""
    many = 4000
    empty, config = torch.zeros(1, 1), {"r": 1, "lora_alpha": 1, "alpha_pattern": {f"x{i}": 2 for i in range(100_000)}}
    tensors = {f"a.m{i}.lora_{side}.weight": empty for i in range(many) for side in "AB"}
    tensors |= {f"b{i}_lora{i}.{side}.weight": empty for i in range(many) for side in ("down", "up")}
    path = save(tensors, tmp_path, {"lora_adapter_metadata": json.dumps(config)})
    begin = time.process_time()
    assert len(open_lora(path)) == many + 10
    assert time.process_time() - begin < 10
    path = save({f"m.lora_A.{i}.weight": empty for i in range(many)}, tmp_path, name="adapters.safetensors")
    with pytest.raises(FormatError, match="holds 4000 adapters, allowed: 8"):
        open_lora(path)


def test_endless_keys_are_refused(tmp_path: Path) -> None:
    path = save({f"{'_qwen.' * 50_000}lora_A.weight": torch.zeros(1, 1)}, tmp_path)
    with pytest.raises(FormatError, match="a key of 300013 characters, allowed: 1000"):
        open_lora(path)


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    path, bomb = tmp_path / "lora.pt", tmp_path / "bomb.pt"
    torch.save({"m.lora_down.weight": torch.zeros(64, 2**16), "m.lora_up.weight": torch.zeros(3, 64)}, path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    assert bomb.stat().st_size < path.stat().st_size / 100
    with pytest.raises(FormatError, match=r"bomb\.pt: .*unpacks to"):
        open_lora(bomb)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")
def test_opening_a_large_file_reads_none_of_it(tmp_path: Path) -> None:
    """A sparse file of 2 GB: resident memory does not grow with it."""
    import resource

    path = tmp_path / "large.safetensors"
    size = 2**28 * 4
    header = {
        "m.lora_down.weight": {"dtype": "F32", "shape": [16, 2**24], "data_offsets": [0, size]},
        "m.lora_up.weight": {"dtype": "F32", "shape": [2**24, 16], "data_offsets": [size, 2 * size]},
    }
    data = file_of(header, b"")
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(len(data) + 2 * size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = open_lora(path)
    assert source.factor_bytes("m") == 2 * size
    assert source.shapes["m"].inputs == 2**24
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**27
