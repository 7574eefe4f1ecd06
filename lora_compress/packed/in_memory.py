"""A packed LoRA whose tensors another program has read into memory. Its modules stay coded until each is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import FormatError
from ..layouts.plain import PlainKeys
from ..update import LowRankUpdate
from .file import INDEX_KEY, PAYLOAD_KEY
from .index import ModuleRecord, read_index
from .reader import PackedModules

__all__ = ["PackedModule", "cut_tensors", "packed_layers", "packed_modules"]

_opened = WeakTensorKeyDictionary()  # {tensor of the index: modules by layer}, for as long as that tensor lives

# The keys of `up` by which ComfyUI finds a layer's LoRA (comfy/weight_adapter/lora.py, LoRAAdapter.load).
_UPS = (
    ".lora_up.weight",
    "_lora.up.weight",
    ".lora_B.weight",
    ".lora.up.weight",
    ".lora_B",
    ".lora_linear_layer.up.weight",
    ".lora_B.default.weight",
)


@dataclass(frozen=True, eq=False)
class PackedModule:
    """One module that is still coded. Programs that move or cast every tensor that they find in a LoRA find none here.

    Args:
        entry: what the index says of it.
        modules: the LoRA that it belongs to.
    """

    entry: ModuleRecord
    modules: PackedModules

    def decode(self) -> LowRankUpdate:
        """Decode the update, float32 on the CPU; nothing of it is kept.

        Raises:
            FormatError: damage, or a codec that this program does not know.
        """
        return self.modules.decode(self.entry.name)


def packed_modules(tensors: Mapping[str, Tensor], where: str = "LoRA") -> dict[str, PackedModule]:
    """Return the modules of a packed file by name, from the tensors under INDEX_KEY and PAYLOAD_KEY, which lie on the CPU.

    Modules of which a cut file has no stage are left out.

    Args:
        tensors: of the packed file, by key; the others are ignored.
        where: names the LoRA in messages.

    Raises:
        FormatError: the tensors are no packed file, or contradict each other.
    """
    modules = _opened_modules(tensors, where)
    return {name: PackedModule(entry, modules) for name, entry in modules.entries.items()}


def packed_layers(tensors: Mapping[str, Tensor]) -> Mapping[str, PackedModule]:
    """Return the modules of a packed file by the names under which programs look for a layer in the expanded file.

    They are read once for each LoRA in memory, and kept as long as its index is.

    Raises:
        FormatError: as `packed_modules`.
    """
    index = tensors[INDEX_KEY]
    if index not in _opened:
        _opened[index] = {_layer_name(name, module.entry.keys): module for name, module in packed_modules(tensors).items()}
    found: Mapping[str, PackedModule] = _opened[index]
    return found


def cut_tensors(tensors: Mapping[str, Tensor], size: int, where: str = "LoRA") -> dict[str, Tensor]:
    """Return the tensors of the LoRA that the first bytes of the payload are: of a progressive one, a smaller LoRA.

    Args:
        tensors: of a packed file, by key. Nothing of them is copied.
        size: bytes of the payload to keep at most.
        where: names the LoRA in messages.

    Raises:
        FormatError: as `packed_modules`; `size` has no room for a first stage of every module.
    """
    index = _opened_modules(tensors, where).index
    cut, used = index.cut(size)
    if cut.missing:
        raise FormatError(
            f"{where}: the first {size} bytes of its payload lack {cut.missing} of {len(index.entries)} modules: take a larger size"
            ", or compress with strategy=entropy progressive=true"
        )
    return {**tensors, INDEX_KEY: cut.encode(), PAYLOAD_KEY: tensors[PAYLOAD_KEY][:used]}


def _layer_name(module: str, keys: PlainKeys) -> str:
    """Return the name under which programs look for a module in the expanded file: its key of `up` without the ending."""
    up = keys.up.replace("{}", module, 1)
    return next((up.removesuffix(ending) for ending in _UPS if up.endswith(ending)), module)


def _opened_modules(tensors: Mapping[str, Tensor], where: str) -> PackedModules:
    if INDEX_KEY not in tensors or PAYLOAD_KEY not in tensors:
        raise FormatError(f"{where}: has no {INDEX_KEY}: it is no packed LoRA")
    data, payload = tensors[INDEX_KEY], tensors[PAYLOAD_KEY]
    for key, tensor in ((INDEX_KEY, data), (PAYLOAD_KEY, payload)):
        if tensor.dtype != torch.uint8 or tensor.ndim != 1:
            raise FormatError(f"{where}: {key} is {tensor.dtype} {tuple(tensor.shape)}, not bytes: another program has changed it")

    def read(begin: int, length: int) -> bytes:
        part: bytes = payload[begin : begin + length].numpy().tobytes()
        return part

    return PackedModules(read_index(data.numpy().tobytes(), where), len(payload), len(payload), read, where)
