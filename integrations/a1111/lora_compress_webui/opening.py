"""The tensors of a packed file as the loaders of both hosts want them: a key for each module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_compress.container import INDEX_KEY, PAYLOAD_KEY
from lora_compress.held import held_layers

__all__ = ["MODULE", "by_module"]

MODULE = "lora_compress.packed"  # what follows a module's name: two parts, which AUTOMATIC1111 splits off for SD3


def by_module(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """`tensors` with {name.MODULE: module, still coded} in the place of index and payload; what is no packed file, as it is."""
    if INDEX_KEY not in tensors:
        return tensors
    here = {**tensors, INDEX_KEY: tensors[INDEX_KEY].cpu(), PAYLOAD_KEY: tensors[PAYLOAD_KEY].cpu()}
    others = {key: tensor for key, tensor in tensors.items() if key not in (INDEX_KEY, PAYLOAD_KEY)}
    return others | {f"{layer}.{MODULE}": module for layer, module in held_layers(here).items()}
