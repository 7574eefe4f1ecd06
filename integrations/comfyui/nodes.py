"""The nodes: load a packed LoRA at a size of one's choice, compress a LoRA file, tell what is in one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths

from lora_compress.engine.to_file import compress_file
from lora_compress.inspection.file import inspect_file
from lora_compress.packed.file import INDEX_KEY, PAYLOAD_KEY
from lora_compress.packed.in_memory import cut_tensors
from lora_compress.quantization import STRATEGIES
from lora_compress.settings import CompressionSettings
from lora_compress.settings.budget import parse_size

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

_CATEGORY = "lora_compress"
_STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}


def _names() -> list[str]:
    return folder_paths.get_filename_list("loras")


def _path(name: str) -> str:
    return folder_paths.get_full_path_or_raise("loras", name)


def _age(name: str) -> float:
    """ComfyUI runs a node again where this has changed."""
    return os.path.getmtime(_path(name))


class LoadCompressedLora:
    """Packed and plain files; of a progressive one no more than `target_size`, such as 8MB, is kept in memory."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = _CATEGORY
    DESCRIPTION = __doc__

    def __init__(self) -> None:
        self._loaded: tuple[tuple[str, float], Mapping[str, Any], Any] | None = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "lora_name": (_names(),),
                "strength_model": ("FLOAT", _STRENGTH),
                "strength_clip": ("FLOAT", _STRENGTH),
                "target_size": ("STRING", {"default": "", "tooltip": "Such as 8MB, for progressive files; empty: the whole file."}),
            },
            "optional": {"clip": ("CLIP",)},
        }

    @classmethod
    def IS_CHANGED(cls, lora_name: str, **_: Any) -> float:
        return _age(lora_name)

    def load(
        self, model: Any, lora_name: str, strength_model: float, strength_clip: float, target_size: str = "", clip: Any = None
    ) -> tuple[Any, Any]:
        """The model and the CLIP with the LoRA as patches."""
        path = _path(lora_name)
        state = path, os.path.getmtime(path)
        if self._loaded is None or self._loaded[0] != state:
            tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
            self._loaded = state, tensors, metadata
        _, tensors, metadata = self._loaded
        if target_size.strip():
            if INDEX_KEY not in tensors:
                raise ValueError(f"{lora_name}: target_size={target_size} is for progressive packed files, this one is plain")
            around = os.path.getsize(path) - tensors[PAYLOAD_KEY].numel()  # header, index and what is carried through
            tensors = cut_tensors(tensors, max(parse_size(target_size) - around, 0), lora_name)
        return comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip, lora_metadata=metadata)


class CompressLora:
    """Writes a smaller file beside the original: quantized and packed for this plug-in, or plain and pruned for every program."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "compress"
    CATEGORY = _CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora_name": (_names(),),
                "save_as": ("STRING", {"default": "compressed.safetensors", "tooltip": "In the folder of the original."}),
                "strategy": ([*STRATEGIES, "none"], {"default": "entropy", "tooltip": "none: not quantized, pruned alone."}),
                "bits": ("FLOAT", {"default": 4.0, "min": 1.0, "max": 8.0, "step": 0.5}),
                "rank_ratio": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
                "target_size": ("STRING", {"default": "", "tooltip": "Such as 20MB, instead of bits and rank_ratio."}),
                "progressive": ("BOOLEAN", {"default": False, "tooltip": "With entropy: any beginning is a smaller LoRA."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora_name: str, **_: Any) -> float:
        return _age(lora_name)

    def compress(
        self, lora_name: str, save_as: str, strategy: str, bits: float, rank_ratio: float, target_size: str, progressive: bool
    ) -> dict[str, Any]:
        """The report, in words."""
        chosen = STRATEGIES.get(strategy)
        values: dict[str, Any] = {"strategy": strategy} if chosen else {}
        if target_size.strip():
            values["target_size"] = target_size.strip()
        else:
            values["rank_ratio"] = rank_ratio
        if chosen and not (target_size.strip() and chosen.averages):
            values["bits"] = bits
        if progressive:
            values["progressive"] = True
        source = Path(_path(lora_name))
        if Path(save_as).name != save_as:
            raise ValueError(f"save_as={save_as}: must be a name without folders: the file is written beside the original")
        report = compress_file(source, source.parent / save_as, CompressionSettings.parse(values))
        before, after = report.bytes
        lines = [f"{report.status}: {save_as}, {before} bytes to {after}", *report.notes]
        return {"ui": {"text": lines}, "result": ("\n".join(lines),)}


class LoraInfo:
    """Family, layout, ranks and bytes of a file, and what smaller ones cut from it would lose."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("info",)
    FUNCTION = "tell"
    CATEGORY = _CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"lora_name": (_names(),)}}

    @classmethod
    def IS_CHANGED(cls, lora_name: str) -> float:
        return _age(lora_name)

    def tell(self, lora_name: str) -> dict[str, Any]:
        """A line for each fact."""
        found = inspect_file(_path(lora_name))
        low, high = found.ranks
        lines = [
            f"{lora_name}: {found.layout} layout, {found.family}, {found.stored_as}, {found.bytes} bytes",
            f"{len(found.modules)} modules, ranks {low} to {high}",
            *(f"{size} bytes would have a relative error of {error:.1%}" for size, error in found.curve),
            *found.notes,
        ]
        return {"ui": {"text": lines}, "result": ("\n".join(lines),)}


NODE_CLASS_MAPPINGS = {
    "LoraCompressLoad": LoadCompressedLora,
    "LoraCompressCompress": CompressLora,
    "LoraCompressInfo": LoraInfo,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoraCompressLoad": "Load Compressed LoRA",
    "LoraCompressCompress": "Compress LoRA",
    "LoraCompressInfo": "LoRA Info",
}
