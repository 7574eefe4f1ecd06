"""The index of a packed file: it comes back as it was written, and one that lies is refused before anything is made by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_compress import FormatError
from lora_compress.layouts.plain import PlainKeys
from lora_compress.packed.chunks import Chunk
from lora_compress.packed.index import ModuleRecord, PackedIndex, read_index

ROOT = Path(__file__).resolve().parents[2]
PEFT = PlainKeys("{}.lora_A.weight", "{}.lora_B.weight", None)


@st.composite
def entries(draw: st.DrawFn, name: str) -> ModuleRecord:
    outputs, inputs = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kept = tuple(
        draw(st.none() | st.sets(st.integers(0, count - 1), min_size=1).map(lambda found: tuple(sorted(found))))
        for count in (outputs, inputs)
    )
    kernel = draw(st.sampled_from([(), (1,), (3, 3), (2, 2, 2)]))
    entry = ModuleRecord(
        name, outputs, inputs, kernel, 1, draw(st.sampled_from(["int4", "entropy"])), {"step": draw(st.floats(0, 9))}, kept
    )
    rank = draw(st.integers(1, min(entry.stored)))
    return replace(entry, rank=rank, keys=draw(st.sampled_from([entry.keys, PEFT])))


@st.composite
def indexes(draw: st.DrawFn) -> PackedIndex:
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=5))
    modules = [draw(entries(name)) for name in names]
    data = st.lists(st.tuples(st.integers(0, len(modules) - 1), st.binary(max_size=30)), max_size=9) if modules else st.just([])
    return PackedIndex.of(
        draw(st.sampled_from(["kohya", "peft"])), modules, [(module, Chunk.of(chunk)) for module, chunk in draw(data)]
    )


@settings(max_examples=60, deadline=None)
@given(index=indexes())
def test_an_index_comes_back_as_it_was(index: PackedIndex) -> None:
    assert read_index(index.encode().numpy().tobytes(), "here") == index


@settings(max_examples=40, deadline=None)
@given(index=indexes(), size=st.integers(0, 200))
def test_a_cut_index_covers_what_fits_and_no_more(index: PackedIndex, size: int) -> None:
    cut, covered = index.cut(size)
    lengths = [length for _, length, _ in index.chunks]
    assert cut.chunks == index.chunks[: len(cut.chunks)]
    assert covered == sum(lengths[: len(cut.chunks)]) <= size
    assert len(cut.chunks) == len(lengths) or covered + lengths[len(cut.chunks)] > size


@settings(max_examples=60, deadline=None)
@given(index=indexes(), data=st.data())
def test_what_nothing_is_told_of_can_be_left_out(index: PackedIndex, data: st.DataObject) -> None:
    named = data.draw(st.sets(st.sampled_from([entry.name for entry in index.entries]))) if index.entries else set()
    filled = {index.entries[module].name for module, length, _ in index.chunks if length}
    told = index.without_empty(named)
    assert [entry.name for entry in told.entries] == [e.name for e in index.entries if e.name in filled | named]
    whole, less = ([(each.entries[m].name, n, crc) for m, n, crc in each.chunks] for each in (index, told))
    assert less == [chunk for chunk in whole if chunk[0] in filled | named]
    assert told.payload == index.payload
    assert read_index(told.encode().numpy().tobytes(), "here") == told


def content(**change: Any) -> dict[str, Any]:
    """A good index of one module of 8 x 6 weights, rank 2, and one chunk of 12 bytes; columns of modules and chunks replaced."""
    modules = {"name": "m", "out": 8, "in": 6, "kernel": [], "rank": 2, "codec": "int4", "parameters": {}, "keys": 0}
    modules["crc32"] = 5
    chunks = {"module": 0, "bytes": 12}
    tree: dict[str, Any] = {
        "layout": "kohya",
        "keys": [["{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha"]],
        "modules": {name: [change.get(name, value)] for name, value in modules.items()},
        "kept": {},
        "chunks": {name: [change.get(name, value)] for name, value in chunks.items()},
    }
    return tree | {name: value for name, value in change.items() if name in tree}


def read(tree: Any) -> PackedIndex:
    return read_index(zlib.compress(json.dumps(tree).encode()), "here")


def test_the_good_index_of_these_tests_is_read() -> None:
    (entry,) = read(content()).entries
    assert (entry.name, entry.outputs, entry.inputs, entry.rank) == ("m", 8, 6, 2)
    assert read(content(kept={"0": ["81", None]})).entries[0].kept == ((0, 7), None)


LIES: dict[str, dict[str, Any]] = {
    "a name that is no text": {"name": "\ud800"},
    "rank above the layer's": {"rank": 7},
    "rank above the kept channels": {"kept": {"0": ["80", None]}},
    "rank 0": {"rank": 0},
    "rank as text": {"rank": "2"},
    "rank as a fraction": {"rank": 2.0},
    "rank as true": {"rank": True},
    "no outputs": {"out": 0},
    "negative inputs": {"in": -6},
    "a layer of 2^62 weights": {"out": 2**31, "in": 2**31},
    "a kernel of 2^40": {"kernel": [2**20, 2**20]},
    "a kernel of four dimensions": {"kernel": [1, 1, 1, 1]},
    "a kernel of text": {"kernel": ["3"]},
    "a name as a number": {"name": 3},
    "an endless name": {"name": "m" * 1001},
    "a style of keys that is none": {"keys": 1},
    "a negative style of keys": {"keys": -1},
    "no codec": {"codec": None},
    "parameters as a list": {"parameters": []},
    "a chunk of no module": {"module": 1},
    "a chunk of a module before the first": {"module": -1},
    "a chunk of a negative length": {"bytes": -12},
    "a check of 33 bits": {"crc32": 2**32},
    "a check of text": {"crc32": "5"},
    "a chunk of 2^40 bytes": {"bytes": 2**40},
    "a bitmap too long": {"kept": {"0": ["ffff", None]}},
    "a bitmap too short": {"kept": {"0": [None, ""]}},
    "a bitmap beyond the channels": {"kept": {"0": [None, "ff"]}},
    "an empty bitmap": {"kept": {"0": ["00", None]}},
    "a bitmap in base 64": {"kept": {"0": ["_-", None]}},
    "three bitmaps": {"kept": {"0": ["ff", None, None]}},
    "kept as a list": {"kept": []},
    "half a style of keys": {"keys": [["{}.a", "{}.b"]]},
    "two equal keys": {"keys": [["{}.a", "{}.a", None]]},
    "endless keys": {"keys": [["{}" + "a" * 1000, "{}.b", None]]},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused(lie: str) -> None:
    tree = content(**LIES[lie])
    if isinstance(LIES[lie].get("keys"), list):
        tree["modules"]["keys"] = [0]
    with pytest.raises(FormatError, match=r"^here: its index cannot be read"):
        read(tree)


MISSHAPEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda tree: [tree],
    "a number": lambda tree: 3,
    "no modules": lambda tree: {key: value for key, value in tree.items() if key != "modules"},
    "a column less": lambda tree: tree | {"modules": {k: v for k, v in tree["modules"].items() if k != "rank"}},
    "a column longer": lambda tree: tree | {"modules": tree["modules"] | {"rank": [2, 2]}},
    "a column of text": lambda tree: tree | {"modules": tree["modules"] | {"name": "m"}},
    "a module twice": lambda tree: tree | {"modules": {key: value * 2 for key, value in tree["modules"].items()}},
    "chunks of other lengths": lambda tree: tree | {"chunks": tree["chunks"] | {"bytes": []}},
    "too many modules": lambda tree: tree | {"modules": {key: value * (2**16 + 1) for key, value in tree["modules"].items()}},
}


@pytest.mark.parametrize("shape", MISSHAPEN)
def test_an_index_of_another_shape_is_refused(shape: str) -> None:
    with pytest.raises(FormatError, match=r"^here: its index cannot be read"):
        read(MISSHAPEN[shape](content()))


def test_two_modules_whose_keys_meet_are_refused() -> None:
    tree = content()
    tree["modules"] = {column: values * 2 for column, values in tree["modules"].items()}
    tree["modules"] |= {"name": ["m", "m.x"], "keys": [0, 1]}
    tree["keys"] = [["{}.x.down", "{}.x.up", None], ["{}.down", "{}.other", None]]
    with pytest.raises(FormatError, match="two modules have the same keys"):
        read(tree)


@pytest.mark.parametrize("weights", [2**28, 2**28 + 2**10 * 12, 2**28 + 2**10 * 12 + 4])
def test_what_a_file_may_promise_grows_with_its_bytes(weights: int) -> None:
    """A chunk of 12 bytes and a module of `weights` weights, rank 4 of a layer of 4 outputs."""
    tree = content(out=4, rank=4)
    tree["modules"]["in"] = [weights // 4 - 4]
    index = read(tree)
    if weights <= 2**28 + 2**10 * 12:
        index.check_declared()
    else:
        with pytest.raises(FormatError, match="too many to be true"):
            index.check_declared()
        with pytest.raises(FormatError, match="too many to be true"):
            index.encode()  # what no reader takes is not written


def test_an_index_that_no_reader_takes_is_not_written() -> None:
    modules = [ModuleRecord(f"{i}" + "m" * 900, 8, 6, (), 2, "int4", {}) for i in range(5000)]
    with pytest.raises(FormatError, match="more than a packed file can have"):
        PackedIndex.of("kohya", modules, []).encode()


def test_kept_channels_of_a_large_file_fit() -> None:
    """1,014 modules with every third channel of 1,280 and 2,048 kept: a list of numbers would take 4 MB and more."""
    kept = tuple(range(0, 1280, 3)), tuple(range(0, 2048, 3))
    modules = [ModuleRecord(f"lora_unet_module_number_{i}", 1280, 2048, (), 16, "int4", {}, kept) for i in range(1014)]
    index = PackedIndex.of("kohya", modules, [])
    assert read_index(index.encode().numpy().tobytes(), "here") == index


LARGE = """
import json, os, sys, zlib
sys.path[:0] = sys.argv[1:3]
from core.test_index import content
from lora_compress import FormatError
from lora_compress.packed.index import read_index

def of_tree(**columns):
    tree = content()
    for name, change in columns.items():
        tree[name] |= change
    return zlib.compress(json.dumps(tree, separators=(",", ":")).encode())

def repeated(text):
    return zlib.compress(b'{"modules":[' + text * ((2**22 - 20) // len(text)) + b'0]}')

def told(word):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(word))

count, one = 2**16, content()["modules"]
files = {
    "modules": of_tree(modules={k: v * count for k, v in one.items()} | {"name": [f"{i:x}" for i in range(count)]}),
    "chunks": of_tree(chunks={"module": [0] * 600_000, "bytes": [0] * 600_000}),
    "bomb": zlib.compress(bytes(2**27)),
    "objects": repeated(b'{"":0},'),
    "lists": repeated(b"[[]],"),
    "numbers": repeated(b"1.5,"),
    "texts": repeated(b'"\\u1234",'),
}
for name, data in files.items():
    if os.fork() == 0:
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
        before = told("VmRSS")
        try:
            read_index(data, "here")
            result = "read"
        except FormatError:
            result = "refused"
        print(name, result, told("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc")
def test_no_index_takes_much_memory() -> None:
    """The largest that are read, and what would swell most of what is refused."""
    command = [sys.executable, "-c", LARGE, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: (result, int(taken)) for name, result, taken in map(str.split, done.stdout.splitlines())}
    assert [name for name, (result, _) in found.items() if result == "read"] == ["modules", "chunks"]
    assert len(found) == 7
    assert max(taken for _, taken in found.values()) < 200e6, found
