"""Packed LoRA files in AUTOMATIC1111, Forge and reForge: the host's own loader opens them, and decodes a module to compute with."""

import importlib

__all__ = ["register"]

_LOADERS = {
    "backend.patcher.lora": "forge",
    "ldm_patched.modules.weight_adapter": "reforge",
}  # what a host alone has, and ours for it


def register() -> None:
    """Tell the host's LoRA loader of packed files: Forge's or reForge's where there is one, else AUTOMATIC1111's."""
    ours = next((ours for theirs, ours in _LOADERS.items() if _importable(theirs)), "a1111")
    importlib.import_module(f".{ours}", __name__).register()


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        return False
    return True
