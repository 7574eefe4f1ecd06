"""A packed file whose tensors another program has already read: its modules stay coded until each is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import FormatError
from ..layouts.plain import PlainKeys
from ..update import LowRankUpdate
from .chunks import are_intact
from .file import INDEX_KEY, PAYLOAD_KEY
from .index import Entry, PackedIndex, read_index
from .module import decode_module

__all__ = ["HeldModule", "held_layers", "held_modules", "held_part"]

_opened = WeakTensorKeyDictionary()  # {index: modules by layer}, for as long as the LoRA is in memory

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
class HeldModule:
    """One module, coded. Programs that move or cast every tensor that they find in a LoRA find none here.

    Args:
        entry: what the index says of it.
        layers: of its payload, uint8 (n,), views of the payload.
        checksums: of the layers, see `chunks.are_intact`.
        where: names the LoRA in messages.
    """

    entry: Entry
    layers: tuple[Tensor, ...]
    checksums: tuple[int, ...]
    where: str

    def decode(self) -> LowRankUpdate:
        """The update, float32 on the CPU; nothing of it is kept.

        Raises:
            FormatError: damage, or a codec that this program does not know.
        """
        layers = [layer.numpy().tobytes() for layer in self.layers]
        if not are_intact(layers, self.checksums):
            raise FormatError(f"{self.where}: {self.entry.name}: its bytes do not match their checksum: the file is damaged")
        try:
            return decode_module(self.entry, layers)
        except FormatError as error:
            raise FormatError(f"{self.where}: {self.entry.name}: {error}") from None


def held_modules(tensors: Mapping[str, Tensor], where: str = "LoRA") -> dict[str, HeldModule]:
    """The modules of a packed file by name, from the tensors under INDEX_KEY and PAYLOAD_KEY, which lie on the CPU.

    Modules of which a cut file has no layer are left out.

    Raises:
        FormatError: the tensors are no packed file, or contradict each other.
    """
    index, payload = _index(tensors, where), tensors[PAYLOAD_KEY]
    layers: dict[int, list[tuple[Tensor, int]]] = {}
    begin = 0
    for module, length, crc in index.chunks:
        layers.setdefault(module, []).append((payload[begin : begin + length], crc))
        begin += length
    return {
        index.entries[i].name: HeldModule(index.entries[i], tuple(part for part, _ in parts), tuple(crc for _, crc in parts), where)
        for i, parts in layers.items()
    }


def held_layers(tensors: Mapping[str, Tensor]) -> Mapping[str, HeldModule]:
    """The same by the names under which programs look for a layer in the expanded file; read once for each LoRA in memory.

    Raises:
        FormatError: as `held_modules`.
    """
    index = tensors[INDEX_KEY]
    if index not in _opened:
        _opened[index] = {_layer_name(name, module.entry.keys): module for name, module in held_modules(tensors).items()}
    found: Mapping[str, HeldModule] = _opened[index]
    return found


def held_part(tensors: Mapping[str, Tensor], size: int, where: str = "LoRA") -> dict[str, Tensor]:
    """The same LoRA from the first `size` bytes of its payload at most: of a progressive one, a smaller LoRA. Nothing is copied.

    Raises:
        FormatError: as `held_modules`; `size` has no room for a first layer of every module.
    """
    index = _index(tensors, where)
    cut, used = index.cut(size)
    if cut.missing:
        raise FormatError(
            f"{where}: the first {size} bytes of its payload lack {cut.missing} of {len(index.entries)} modules: take a larger size"
            ", or compress with strategy=entropy progressive=true"
        )
    return {**tensors, INDEX_KEY: cut.encode(), PAYLOAD_KEY: tensors[PAYLOAD_KEY][:used]}


def _layer_name(module: str, keys: PlainKeys) -> str:
    """The name under which programs look for a module in the expanded file: its key of `up` without the ending."""
    up = keys.up.replace("{}", module, 1)
    return next((up.removesuffix(ending) for ending in _UPS if up.endswith(ending)), module)


def _index(tensors: Mapping[str, Tensor], where: str) -> PackedIndex:
    if INDEX_KEY not in tensors or PAYLOAD_KEY not in tensors:
        raise FormatError(f"{where}: has no {INDEX_KEY}: it is no packed LoRA")
    data, payload = tensors[INDEX_KEY], tensors[PAYLOAD_KEY]
    for key, tensor in ((INDEX_KEY, data), (PAYLOAD_KEY, payload)):
        if tensor.dtype != torch.uint8 or tensor.ndim != 1:
            raise FormatError(f"{where}: {key} is {tensor.dtype} {tuple(tensor.shape)}, not bytes: another program has changed it")
    index = read_index(data.numpy().tobytes(), where)
    if index.payload != len(payload):
        raise FormatError(f"{where}: {PAYLOAD_KEY} has {len(payload)} bytes, the index speaks of {index.payload}: it is damaged")
    try:
        index.check_declared()
    except FormatError as error:
        raise FormatError(f"{where}: {error}: the file is damaged") from None
    return index
