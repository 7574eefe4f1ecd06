"""Files appear whole or not at all, and their size is known before they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import SaveError

__all__ = ["atomic_path", "safetensors_size", "write_safetensors"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` to write to; on success the file is renamed to `path`, otherwise removed.

    Raises:
        SaveError: the folder cannot be written, the disk is full, or whatever else the system says of it.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.tmp{target.suffix}")  # the next save replaces what a killed one left
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except SaveError:  # of another file that this one waits for
        raise
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"{target}: cannot be written ({_reason(error)}): free disk space or choose another output folder; "
            "whatever was there before is unchanged"
        ) from error
    finally:
        with suppress(OSError):  # a folder that cannot be written holds no temporary file either
            temporary.unlink(missing_ok=True)


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the same content gives the same bytes. Goes together with `atomic_path`."""
    save_file(dict(tensors), path, dict(metadata))
    _sort_metadata(path)


def safetensors_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the safetensors file of `tensors` (meta tensors will do): 8, a JSON header padded to 8, the data."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, in place: its writer has them in another one each time."""
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
