"""Packed LoRA files in AUTOMATIC1111, Forge, Forge Neo and reForge: the host's own loader opens them, and decodes a module to
compute with."""

import importlib

from . import guard

__all__ = ["register"]

_LOADERS = {
    "modules_forge.packages.comfy.weight_adapter": "forge_neo",
    "backend.patcher.lora": "forge",
    "ldm_patched.modules.weight_adapter": "reforge",
}  # what a host alone has, and ours for it; Forge Neo has the second one too


def register() -> None:
    """Tell the host's LoRA loader of packed files: that of AUTOMATIC1111 where none of the others is found.

    Where the loader is not one of those that are known, every prompt that names a packed file becomes an error.
    """
    try:
        ours = next((ours for theirs, ours in _LOADERS.items() if _importable(theirs)), "a1111")
        importlib.import_module(f".{ours}", __name__).register()
    except Exception as error:
        guard.watch(f"LoRA Compress does not know this version of the program ({type(error).__name__}: {error})")
        raise
    guard.watch()


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        return False
    return True
