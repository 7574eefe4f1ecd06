"""The network module that is extended for a model, and the network_args that it reads."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_compress import CompressionSettings, LoraCompressError, SettingsError, setting_names, split_settings

__all__ = [
    "LYCORIS",
    "base_module",
    "empty_arguments",
    "host_arguments",
    "import_base",
    "networks_with_argument",
    "split_arguments",
    "unread_arguments",
]

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
_EMPTY_FIELDS = ("undefined", "null", "nan")  # of JavaScript and JSON, as the page of lora-scripts writes them
# Written by the kohya_ss GUI whatever the algorithm; LyCORIS ignores them.
_WITHOUT_EFFECT = {LYCORIS: ("rank_dropout_scale", "train_on_input")}
_NUMBERS = re.compile(r"(dim|alpha|dropout|ratio|unit|factor)$")  # arguments that every network converts to a number


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
    return {"base", "dropout", *_read_arguments(inspect.getsource(base)), *_WITHOUT_EFFECT.get(base.__name__, ())}


def split_arguments(values: Mapping[str, Any], base: ModuleType) -> tuple[CompressionSettings, dict[str, Any]]:
    """Part network_args into our settings and the arguments of `base`.

    Raises:
        SettingsError: an argument that neither has, with the networks that have it; a value that is none; settings that do not
            parse. All of them in one error.
    """
    names = host_arguments(base)
    empty = empty_arguments(values)
    foreign = {
        name: networks for name in values if name not in {*names, *setting_names()} and (networks := networks_with_argument(name))
    }
    problems = [*empty.values()] + [
        f"{name}: unknown setting of {base.__name__}, {' and '.join(networks)} {_has(networks)}: leave {name}={values[name]} out"
        + (f", or add base={LYCORIS}" if LYCORIS in networks else "")
        for name, networks in foreign.items()
    ]
    try:
        parted = split_settings({name: value for name, value in values.items() if name not in {**foreign, **empty}}, names)
    except SettingsError as error:
        raise SettingsError([*problems, *error.problems]) from None
    if problems:
        raise SettingsError(problems)
    return parted


def unread_arguments(values: Mapping[str, Any], module: str | None) -> list[str]:
    """Which network_args a network that is not ours does not read, where it is one of sd-scripts or LyCORIS and another one does.

    Args:
        values: the network_args.
        module: the value of network_module.
    """
    arguments = _arguments_by_network().get(str(module))
    if arguments is None:
        return []
    read = {*arguments, *_WITHOUT_EFFECT.get(str(module), ()), "dropout"}
    readers = {name: networks_with_argument(name) for name in values if name not in read}
    ours = [name for name in readers if name in setting_names()]
    return [
        f"{name}, which {' and '.join(found)} {_has(found)}" for name, found in readers.items() if found and name not in ours
    ] + [f"{name}, which networks.lora_compress has" for name in ours]


def empty_arguments(values: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with network_args that a form filled with the word for an empty field, or with nothing, by their names."""
    return {
        name: f"{name}={value}: not a value, but what programs write for a field that was left empty: remove {name}, or give it one"
        + (f", such as {name}=4" if _NUMBERS.search(name) else "")
        for name, value in values.items()
        if str(value).strip().lower() in _EMPTY_FIELDS or (not str(value).strip() and _NUMBERS.search(name))
    }


@functools.cache
def networks_with_argument(name: str) -> tuple[str, ...]:
    """The network modules of sd-scripts and LyCORIS that read the network argument `name`, by their sources; none is imported."""
    return tuple(module for module, arguments in _arguments_by_network().items() if name in arguments)


@functools.cache
def _arguments_by_network() -> dict[str, set[str]]:
    import networks

    files = {f"networks.{path.stem}": path for folder in networks.__path__ for path in sorted(Path(folder).glob("*.py"))}
    lycoris = importlib.util.find_spec(LYCORIS.partition(".")[0])
    for folder in lycoris.submodule_search_locations or () if lycoris else ():
        files[LYCORIS] = Path(folder) / "kohya.py"
    sources = {
        name: path.read_text(encoding="utf-8")
        for name, path in files.items()
        if path.is_file() and not name.startswith("networks.compress_") and name != "networks.lora_compress"
    }
    return {name: _read_arguments(source) for name, source in sources.items() if "\ndef create_network(" in source}


def _read_arguments(source: str) -> set[str]:
    return set(re.findall(r'kwargs\.get\(\s*"(\w+)"', source))


def _has(networks: tuple[str, ...]) -> str:
    return "has it" if len(networks) == 1 else "have it"
