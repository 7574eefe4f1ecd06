"""Files made wrong on purpose: bytes, headers, and what lies behind compression and checksums of a packed file."""

from __future__ import annotations

import json
import random as chance
import struct
import zlib
from typing import Any

INDEX, PAYLOAD = "lora_compress.index", "lora_compress.payload"
NUMBERS = [0, 1, 2, 3, 7, 8, 64, 255, 4096, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, 10**30, -1, -(2**40)]
VALUES: list[Any] = [
    *NUMBERS,
    0.5,
    -0.5,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "{}",
    "x",
    None,
    True,
    False,
    [],
    {},
    [0],
    [[1, 2]],
]
VALUES += [
    "entropy",
    "mixed",
    "nf4",
    "int2",
    "int8",
    "fp8",
    "bf16",
    "fp32",
    {"": 0},
    {"step": 0.1, "layers": 64},
    {"step": 0.1, "layers": 64, "per_plane": 1},
    "ff",
    "\ud800",
]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], payload: bytes) -> bytes:
    """Undo `split`."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + payload


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes, dict[str, tuple[dict[str, Any], bytes]]]:
    """Metadata, index, payload and other tensors of a packed file."""
    header, body = split(data)
    metadata = header.pop("__metadata__", {})
    parts = {key: (entry, body[slice(*entry["data_offsets"])]) for key, entry in header.items()}
    index = json.loads(zlib.decompress(parts.pop(INDEX)[1]))
    return metadata, index, parts.pop(PAYLOAD)[1], parts


def pack(metadata: Any, index: Any, payload: bytes, others: dict[str, tuple[dict[str, Any], bytes]]) -> bytes:
    """Undo `unpack`; an index of bytes goes in as it is."""
    packed = index if isinstance(index, bytes) else zlib.compress(json.dumps(index).encode())
    parts = [*others.items()]
    parts += [(key, ({"dtype": "U8", "shape": [len(blob)]}, blob)) for key, blob in ((INDEX, packed), (PAYLOAD, payload))]
    header, body = {"__metadata__": metadata}, b""
    for key, (entry, blob) in parts:
        header[key] = {**entry, "data_offsets": [len(body), len(body) + len(blob)]}
        body += blob
    return joined(header, body)


def mutate(data: bytes, roll: chance.Random) -> bytes:
    """One wrong file made of a good one, plain or packed."""
    kinds = [cut, lengthen, flip, flip, bend_header]
    if INDEX.encode() in data[: 8 + struct.unpack("<Q", data[:8])[0]]:
        kinds += [bend_index] * 6 + [bend_payload] * 8 + [bend_blob]
    return roll.choice(kinds)(data, roll)


def cut(data: bytes, roll: chance.Random) -> bytes:
    """The beginning of a file."""
    return data[: roll.randrange(len(data))]


def lengthen(data: bytes, roll: chance.Random) -> bytes:
    """A file and something more."""
    return data + roll.randbytes(roll.randrange(1, 40))


def flip(data: bytes, roll: chance.Random) -> bytes:
    """Some bytes replaced."""
    changed = bytearray(data)
    end = roll.choice([len(data), min(len(data), 2000)])  # often in the header
    for _ in range(roll.randrange(1, 6)):
        changed[roll.randrange(end)] = roll.randrange(256)
    return bytes(changed)


def bend_header(data: bytes, roll: chance.Random) -> bytes:
    """A header that lies in a well-formed way."""
    header, payload = split(data)
    for _ in range(roll.randrange(1, 4)):
        bend(header, roll)
    return joined(header, payload)


def bend_index(data: bytes, roll: chance.Random) -> bytes:
    """An index that lies in a well-formed way, most often with lengths and checksums that fit the payload."""
    metadata, index, payload, others = unpack(data)
    for _ in range(roll.randrange(1, 4)):
        roll.choice([bend, bend_module, bend_module, bend_chunks])(index, roll)
    if roll.random() < 0.8:
        payload = mend(index, payload)
    return pack(metadata, index, payload, others)


def bend_payload(data: bytes, roll: chance.Random) -> bytes:
    """Other bytes under the right checksums."""
    metadata, index, payload, others = unpack(data)
    changed = bytearray(payload)
    for _ in range(roll.randrange(1, 12)):
        place = roll.randrange(len(changed))
        changed[place : place + roll.choice([1, 1, 4, 40])] = roll.choice(
            [roll.randbytes(1), roll.randbytes(4), bytes(4), b"\xff" * 4]
        )
    return pack(metadata, index, mend(index, bytes(changed)), others)


def bend_blob(data: bytes, roll: chance.Random) -> bytes:
    """An index that does not decompress, or to far more than it is."""
    metadata, index, payload, others = unpack(data)
    blob = zlib.compress(json.dumps(index).encode())
    if roll.random() < 0.3:
        filler = roll.choice([b" ", b"[", b'{"":', b"[],", b'{"":0},', b"0,"])
        blob = zlib.compress(b'{"modules":[' + filler * roll.choice([10_000, 500_000, 5_000_000]))
    elif roll.random() < 0.5:
        blob = blob[: roll.randrange(len(blob))]
    else:
        blob = flip(blob, roll)
    return pack(metadata, blob, payload, others)


def bend(tree: Any, roll: chance.Random) -> None:
    """Change one value somewhere in a tree of JSON: replaced, moved by one, removed, doubled or swapped with another."""
    places = list(_places(tree))
    container, key = roll.choice(places)
    value = container[key]
    kind = roll.randrange(6)
    if kind == 0 and type(value) is int:
        container[key] = value + roll.choice([-1, 1, 8, value])
    elif kind == 1:
        del container[key]
    elif kind == 2 and isinstance(container, list):
        container.insert(key, value)
    elif kind == 3:
        other, name = roll.choice(places)
        if not isinstance(other, list) or name < len(other):
            container[key], other[name] = other[name], container[key]
    elif kind == 4 and isinstance(container, dict):
        container[
            roll.choice(["", "x", "layers", "per_plane", "step", "bits", "block", "lora_unet_m.lora_down.weight", PAYLOAD])
        ] = value
    else:
        container[key] = roll.choice(VALUES)


def bend_module(index: dict[str, Any], roll: chance.Random) -> None:
    """Another size, rank, codec or parameter of one module."""
    columns = index.get("modules")
    if not isinstance(columns, dict) or not isinstance(columns.get("name"), list) or not columns["name"]:
        return
    row = roll.randrange(len(columns["name"]))
    name = roll.choice(["out", "in", "rank", "kernel", "codec", "parameters", "parameters", "keys", "kept"])
    if name == "kept":
        kept = ["".join(roll.choice("0f5") for _ in range(2 * roll.randrange(1, 9))) for _ in range(2)]
        index["kept"] = {str(row): roll.choice([kept, [kept[0], None], [None, kept[1]]])}
        return
    column = columns.get(name)
    if not isinstance(column, list) or row >= len(column):
        return
    if name == "kernel":
        column[row] = roll.choice([[], [1], [3, 3], [1, 1, 1], [2**15, 2**15], [0], [3, 3, 3, 3], ["x"]])
    elif name == "parameters" and isinstance(column[row], dict) and column[row]:
        column[row] = {**column[row], roll.choice([*column[row]]): roll.choice(VALUES)}
    elif name == "codec":
        column[row] = roll.choice(["int2", "int3", "int8", "nf4", "mixed", "entropy", "fp8", "", "zip"])
    else:
        column[row] = roll.choice([*NUMBERS, *NUMBERS, None, 1.0])


def bend_chunks(index: dict[str, Any], roll: chance.Random) -> None:
    """Bytes moved from one chunk to another, a chunk given to another module, chunks left out or said twice."""
    chunks = index.get("chunks")
    if not isinstance(chunks, dict) or not all(isinstance(chunks.get(k), list) and chunks[k] for k in ("module", "bytes")):
        return
    lengths, modules = chunks["bytes"], chunks["module"]
    kind, row, other = roll.randrange(4), roll.randrange(len(lengths)), roll.randrange(len(lengths))
    if kind == 0 and type(lengths[row]) is int and type(lengths[other]) is int:
        moved = roll.choice([1, 4, lengths[row], lengths[row] // 2])
        lengths[row], lengths[other] = lengths[row] - moved, lengths[other] + moved
    elif kind == 1 and row < len(modules):
        modules[row] = roll.choice([0, 1, 2, -1, 2**31])
    elif kind == 2:
        for column in chunks.values():
            if isinstance(column, list):
                del column[row:]
    else:
        for column in chunks.values():
            if isinstance(column, list):
                column[:] = column * roll.choice([2, 100])


def mend(index: Any, payload: bytes) -> bytes:
    """Bring the checksums in line with the payload and its length in line with the index, where the index allows it."""
    try:
        chunks, checks, module, filled = index["chunks"], index["modules"]["crc32"], 0, set()
        if not all(0 <= length <= 2**20 for length in chunks["bytes"]):
            return payload
        payload = payload[: sum(chunks["bytes"])].ljust(min(sum(chunks["bytes"]), 2**22), b"\x5a")
        begin = 0
        for step, length in zip(chunks["module"], chunks["bytes"], strict=False):
            module += step
            if length and module not in filled and module >= 0:
                checks[module] = zlib.crc32(payload[begin : begin + length])
                filled.add(module)
            begin += length
    except (AttributeError, IndexError, KeyError, TypeError):
        pass
    return payload


def _places(tree: Any) -> Any:
    """(container, key) of every value in a tree of JSON."""
    for key in range(len(tree)) if isinstance(tree, list) else list(tree):
        yield tree, key
        if isinstance(tree[key], list | dict):
            yield from _places(tree[key])
