"""The network module that is extended for a model, and the network_args that it reads."""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

from lora_compress import LoraCompressError, SettingsError

__all__ = ["LYCORIS", "base_module", "host_arguments", "import_base"]

LYCORIS = "lycoris.kohya"
_BASES = {  # sd-scripts' network module by the class of the model it fits, or of one it is derived from
    "UNet2DConditionModel": "networks.lora",
    "InferUNet2DConditionModel": "networks.lora",
    "SdxlUNet2DConditionModel": "networks.lora",
    "InferSdxlUNet2DConditionModel": "networks.lora",
    "Flux": "networks.lora_flux",  # Chroma too, which is derived from it
    "MMDiT": "networks.lora_sd3",
    "NextDiT": "networks.lora_lumina",
    "HYImageDiffusionTransformer": "networks.lora_hunyuan_image",
    "Anima": "networks.lora_anima",
}


def base_module(model: Any, chosen: str | None = None) -> ModuleType:
    """The network module for `model`: sd-scripts' own, told by the model's class, or the one that the argument base names.

    Raises:
        LoraCompressError: no network of sd-scripts fits it.
        SettingsError: `chosen` is a module that cannot be extended, or it is not installed.
    """
    if chosen is not None:
        return import_base(chosen)
    for cls in type(model).__mro__:
        if cls.__name__ in _BASES:
            return importlib.import_module(_BASES[cls.__name__])
    raise LoraCompressError(
        f"networks.lora_compress: found a {type(model).__name__}, it can extend the LoRA of {', '.join(_BASES)}"
    )


def import_base(name: str) -> ModuleType:
    """The network module `name`, imported.

    Raises:
        SettingsError: it is none that can be extended, or it is not installed.
    """
    known = [*dict.fromkeys(_BASES.values()), LYCORIS]
    if name not in known:
        raise SettingsError([f"base={name}: must be one of {', '.join(known)}, or left out"])
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        remedy = "pip install lycoris-lora" if name == LYCORIS else "use a version of sd-scripts that has it"
        raise SettingsError([f"base={name}: not installed: {remedy}"]) from error


def host_arguments(base: ModuleType) -> set[str]:
    """The network_args that `base` reads, as its source has them: it keeps no list and ignores unknown ones."""
    return {"base", "dropout", *re.findall(r'kwargs\.get\(\s*"(\w+)"', inspect.getsource(base))}
