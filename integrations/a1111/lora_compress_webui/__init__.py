"""Packed LoRA files in AUTOMATIC1111 and Forge: the host's own loader opens them, and decodes a module when it computes with it."""

import importlib

__all__ = ["register"]


def register() -> None:
    """Tell the host's LoRA loader of packed files: Forge's where there is one, else AUTOMATIC1111's."""
    try:
        importlib.import_module("backend.patcher.lora")
    except ModuleNotFoundError as error:
        if error.name is None or not "backend.patcher.lora".startswith(error.name):
            raise
        from . import a1111

        a1111.register()
    else:
        from . import forge

        forge.register()
