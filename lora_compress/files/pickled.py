"""Weights that torch.save wrote (.pt, .pth, .bin, .ckpt), loaded whole and without running any code of the file."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError
from ..layouts.numbered import keys_of_list
from .recognition import is_torch, what_is
from .regular import require_regular

__all__ = ["load_pickled"]

# Names under which trainers put the weights beside other things, such as the state of the optimizer.
_WRAPPERS = ("state_dict", "model_state_dict", "lora_state_dict", "module", "model", "params_ema", "params", "weights", "lora")
_DEEPEST = 8  # levels of dictionaries in dictionaries
_CODE = re.compile(r"Unsupported (?:global|class|operand)[^\n]*?(?:GLOBAL )?([A-Za-z_][\w.]*\.\w+)")


def load_pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file of torch.save by key, and the metadata that stand for its structure.

    A list is one of cloneofsimo/lora, which names no layer. Dictionaries within dictionaries become keys with dots; a dictionary
    of weights among other things (`state_dict`, `model`, ...) is taken alone. An alpha that is a bare number becomes a tensor.

    Raises:
        FormatError: there is no such file any more, it holds anything but weights, or a tensor that is more than the file holds.
    """
    if not is_torch(path):
        require_regular(path)
        raise FormatError(f"{path}: no file of weights: {what_is(path) or 'give a LoRA as .safetensors or as a PyTorch file'}")
    loaded = _unwrapped(_load(path))
    if isinstance(loaded, list | tuple) and loaded and all(isinstance(item, Tensor) for item in loaded):
        try:
            keyed, metadata = keys_of_list([_checked(path, str(i), item.detach()) for i, item in enumerate(loaded)])
        except ValueError as error:
            raise FormatError(f"{path}: holds {_described(loaded)}, {error}: it is no LoRA") from None
        return keyed, metadata
    if not isinstance(loaded, Mapping):
        raise FormatError(f"{path}: holds {_described(loaded)}, not weights by key: it is no LoRA")
    tensors = dict(_flat(loaded, "", 0))
    if not tensors:
        keys = ", ".join(str(key)[:40] for key in list(loaded)[:3])
        raise FormatError(f"{path}: holds no tensor ({keys or 'nothing at all'}): it is no LoRA")
    return {key: _checked(path, key, value) for key, value in tensors.items()}, {}


def _load(path: Path) -> object:
    try:
        _refuse_zip_bomb(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of quantized and sparse tensors, which are judged below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        require_regular(path)
        raise FormatError(f"{path}: cannot be read as weights alone ({_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line out of the paragraphs that torch says, and what to do."""
    found = _CODE.search(str(error))
    if found:
        return f"it holds a Python object, {found[1]}, which may run code when it is loaded): convert it to .safetensors"
    if isinstance(error, FormatError):
        return f"it {error}): it was made to exhaust memory"
    return "it is damaged or cut short): get it again"


def _unwrapped(loaded: object) -> object:
    """The weights themselves where they stand under a name beside other things."""
    for _ in range(_DEEPEST):
        if not isinstance(loaded, Mapping) or any(isinstance(value, Tensor) for value in loaded.values()):
            return loaded
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            return loaded
        loaded = inner
    return loaded


def _flat(value: object, key: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors and alphas under a value, by key; anything else (names, settings) is no weight."""
    if isinstance(value, Tensor):
        yield key, value.detach()
    elif isinstance(value, int | float) and key.endswith("alpha"):
        yield key, torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, Mapping | list | tuple) and depth < _DEEPEST:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, inner in items:
            yield from _flat(inner, f"{key}.{name}" if key else str(name), depth + 1)


def _checked(path: Path, key: str, tensor: Tensor) -> Tensor:
    """A tensor as a plain one in memory.

    Raises:
        FormatError: it is sparse, has no data, or claims more than the file holds.
    """
    if tensor.is_meta:
        raise FormatError(f"{path}: {key}: has a shape but no data (a tensor of torch's meta device): save the real weights")
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.layout != torch.strided:
        name = str(tensor.layout).removeprefix("torch.")
        raise FormatError(f"{path}: {key}: is a {name} tensor, allowed: dense ones: save it after .to_dense()")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise FormatError(f"{path}: {key}: {tuple(tensor.shape)} is more than the file holds: it is damaged, get it again")
    return tensor


def _described(loaded: object) -> str:
    if not isinstance(loaded, list | tuple):
        return f"a {type(loaded).__name__}"
    kinds = ", ".join(sorted({type(item).__name__ for item in loaded})) or "nothing"
    return f"a {type(loaded).__name__} of {len(loaded)} ({kinds})"


def _refuse_zip_bomb(path: Path) -> None:
    """torch stores tensors uncompressed: an archive that unpacks to far more than it holds was made to exhaust memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 2 * path.stat().st_size + 2**20:
        raise FormatError(f"unpacks to {unpacked} bytes")
