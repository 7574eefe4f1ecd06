"""The tensors of a packed file as the loaders of the hosts want them: a key for each module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lora_compress.packed.file import INDEX_KEY, PAYLOAD_KEY
from lora_compress.packed.in_memory import packed_layers

__all__ = ["MODULE", "by_module", "opening"]

MODULE = "lora_compress.packed"  # what follows a module's name: two parts, which AUTOMATIC1111 splits off for SD3


def by_module(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """`tensors` with {name.MODULE: module, still coded} in the place of index and payload; what is no packed file, as it is."""
    if INDEX_KEY not in tensors:
        return tensors
    here = {**tensors, INDEX_KEY: tensors[INDEX_KEY].cpu(), PAYLOAD_KEY: tensors[PAYLOAD_KEY].cpu()}
    others = {key: tensor for key, tensor in tensors.items() if key not in (INDEX_KEY, PAYLOAD_KEY)}
    return others | {f"{layer}.{MODULE}": module for layer, module in packed_layers(here).items()}


def opening(read: Callable[..., Mapping[str, Any]]) -> Callable[..., Mapping[str, Any]]:
    """`read`, a host's function that gives the tensors of a file, with packed files as `by_module` gives them."""

    @functools.wraps(read, updated=())
    def read_by_module(*args: Any, **kwargs: Any) -> Mapping[str, Any]:
        return by_module(read(*args, **kwargs))

    return read_by_module
