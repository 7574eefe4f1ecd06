"""A packed file that a prompt names and that cannot be applied is an error on the page: the picture would lack the LoRA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_compress.packed.file import is_packed

from .opening import MODULE

__all__ = ["applied_or_error", "recorded", "watch"]

_failures: list[str] = []  # of the present activation: the host prints errors of its loader and draws on
_MARK = "watched_by_lora_compress"


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with its errors also remembered for the page; for those of the host's functions that read a packed file."""

    @functools.wraps(function)
    def recording(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            _failures.append(str(error))
            raise

    return recording


def applied_or_error(load_for_models: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """`load_lora_for_models` of Forge and Forge Neo, which returns its models unchanged where it does not apply a LoRA."""

    @functools.wraps(load_for_models)
    def load_lora_for_models(model: Any, clip: Any, lora: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        packed = sum(key.endswith(f".{MODULE}") for key in lora)
        found = load_for_models(model, clip, lora, *args, **kwargs)
        if packed and found[0] is model and found[1] is clip:
            name = Path(str(kwargs.get("filename", "the packed LoRA"))).name
            raise RuntimeError(
                f"{name}: the loaded model takes none of its {packed} modules: it belongs to another model, or this kind of model "
                "(such as Nunchaku's) reads files by itself; `resize_lora_ext.py expand` makes a plain file of it"
            )
        return found

    return recorded(load_lora_for_models)


def watch(unusable: str = "") -> None:
    """Let the host's generation stop with what `recorded` has seen; once.

    Args:
        unusable: why no packed file can be opened in this host; every prompt that names one is refused then.
    """
    from modules import extra_networks

    if hasattr(extra_networks.activate, _MARK):
        return
    theirs = extra_networks.activate

    @functools.wraps(theirs)
    def activate(p: Any, extra_network_data: Mapping[str, Any]) -> Any:
        if unusable and (named := _packed_in(extra_network_data)):
            raise RuntimeError(f"{', '.join(named)}: packed files cannot be opened here: {unusable}")
        _failures.clear()
        result = theirs(p, extra_network_data)
        if _failures:
            raise RuntimeError("; ".join(dict.fromkeys(_failures)))
        return result

    setattr(activate, _MARK, True)
    extra_networks.activate = activate


def _packed_in(extra_network_data: Mapping[str, Any]) -> list[str]:
    """The packed files that a prompt names."""
    import networks

    found = []
    for parameters in extra_network_data.get("lora", ()):
        name = parameters.positional[0]
        entry = networks.available_networks.get(name) or networks.available_network_aliases.get(name)
        if entry is not None and is_packed(entry.filename):
            found.append(name)
    return found
