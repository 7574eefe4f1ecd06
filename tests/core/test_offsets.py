"""Tensors lie one after the other in a file, as safetensors demands, and inputs are regular files that stay as they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from core.mutations import joined, split
from core.samples import kohya_file, packed_file
from safetensors import SafetensorError, safe_open

from lora_compress import FormatError, load_lora, open_lora
from lora_compress.files.regular import open_regular

ROOT = Path(__file__).resolve().parents[2]


def overlap(header: dict[str, Any], data: bytes) -> bytes:
    """A tensor that lies where another one does."""
    keys = [key for key in header if key != "__metadata__"]
    header["copy"] = dict(header[max(keys, key=lambda key: header[key]["data_offsets"][1])])
    return data


def hole(header: dict[str, Any], data: bytes) -> bytes:
    """Eight bytes in front of the last tensor."""
    last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + 8, end + 8]
    return data[:begin] + bytes(8) + data[begin:]


def behind(header: dict[str, Any], data: bytes) -> bytes:
    """Bytes behind the last tensor."""
    return data + bytes(8)


def too_few(header: dict[str, Any], data: bytes) -> bytes:
    """A shape that takes more bytes than the tensor has."""
    next(entry for key, entry in header.items() if key != "__metadata__")["shape"] = [1 << 20, 1 << 10]
    return data


def negative(header: dict[str, Any], data: bytes) -> bytes:
    """An offset before the data."""
    first = min((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    header[first]["data_offsets"][0] = -8
    return data


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("lie", [overlap, hole, behind, too_few, negative], ids=lambda lie: lie.__name__)
def test_offsets_that_lie_are_refused_when_the_header_is_read(lie: Any, form: str, tmp_path: Path) -> None:
    path = kohya_file(tmp_path / "plain.safetensors", count=2, width=24, rank=4)
    if form == "packed":
        path = packed_file("int4", path, tmp_path / "packed.safetensors")
    load_lora(path)
    header, data = split(path.read_bytes())
    data = lie(header, data)
    path.write_bytes(joined(header, data))
    with pytest.raises((SafetensorError, OverflowError)), safe_open(path, "pt"):
        pass
    with pytest.raises(FormatError, match=rf"^{path}: .*the file"):
        open_lora(path)


def test_a_plain_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = kohya_file(tmp_path / "lora.safetensors", count=2, width=1024, rank=4)
    script = (
        "import os, sys\nfrom lora_compress import FormatError, open_lora\nsource = open_lora(sys.argv[1])\n"
        "os.truncate(sys.argv[1], 4096)\ntry:\n    [float(source[n].up.sum()) for n in source]\n"
        "except FormatError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr  # a mapped file would end the process with SIGBUS
    assert "another program has written to the file since it was opened" in done.stdout


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_a_file_that_is_exchanged_while_it_is_open_is_read_as_it_was_or_refused(form: str, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> Path:
        path = kohya_file(tmp_path / f"{name}.safetensors", count=2, width=24, rank=4)
        data = bytearray(path.read_bytes())
        data[-1] ^= seed
        path.write_bytes(data)
        return packed_file("int4", path, tmp_path / f"packed {name}.safetensors") if form == "packed" else path

    path, other = made("one", 0), made("other", 1)
    wanted = load_lora(path).updates
    source = open_lora(path)
    os.replace(other, path)
    try:
        assert all(torch.equal(source[name].up, wanted[name].up) for name in source)
    except FormatError as error:
        assert "another program has written to the file" in str(error)
    source.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_only_regular_files_are_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / f"link.{name}").symlink_to(name)
    (tmp_path / f"folder.{name}").mkdir()
    for path, kind in ((tmp_path / name, "a FIFO"), (tmp_path / f"link.{name}", "a FIFO"), (Path("/dev/zero"), "a device")):
        with pytest.raises(FormatError, match=f"is {kind}: only regular files are read"):
            open_lora(path)
        with pytest.raises(FormatError, match=f"is {kind}"):
            open_regular(path)
    with pytest.raises(FormatError, match="is a folder"):
        open_regular(tmp_path / f"folder.{name}")


def test_a_cut_file_whose_header_length_looks_like_a_pickle_is_called_cut(tmp_path: Path) -> None:
    """A header of 0x0280 bytes begins with the two bytes that begin a pickle of protocol 2."""
    path = tmp_path / "lora.safetensors"
    path.write_bytes((0x0280).to_bytes(8, "little") + b'{"lora_unet_a.alpha":')
    with pytest.raises(FormatError, match="cut short"):
        open_lora(path)
