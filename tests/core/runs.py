"""One run of every setting on the files of `exact`: what `data/make_outputs.py` records and `test_same_bytes.py` repeats."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from core.exact import exact_file

from lora_compress import CompressionSettings, compress, compress_file, expand_file, load_lora, save, truncate_file

__all__ = ["CLOSE", "RUNS", "Run"]

_ENTROPY = {"strategy": "entropy"}


@dataclass(frozen=True)
class Run:
    """Settings on an exact file, and what is done with the result.

    Args:
        layout: of `exact.LAYOUTS`.
        settings: of `CompressionSettings`.
        options: of `compress_file`.
        then: "" or `expand`, `truncate` or `memory`: written as a plain file, cut to two thirds, or compressed and saved in memory.
    """

    layout: str
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    then: str = ""

    def files(self, folder: Path) -> list[Path]:
        """Do it in an empty folder; every file that was written, in order of names, the source apart."""
        source, target = exact_file(self.layout, folder / "source.safetensors"), folder / "a.safetensors"
        settings = CompressionSettings.parse(self.settings)
        if self.then == "memory":
            file = load_lora(source)
            save(compress(file.updates, settings, torch.float16, file.metadata), target, torch.float16)
        else:
            report = compress_file(source, target, settings, **self.options)
            assert report.status == "written", report.notes
        if self.then == "expand":
            expand_file(target, folder / "b.safetensors")
        elif self.then == "truncate":
            truncate_file(target, folder / "b.safetensors", target.stat().st_size * 2 // 3)
        return sorted(path for path in folder.glob("*.safetensors") if path != source)


RUNS = {
    "new_rank": Run("kohya", {"new_rank": 4}),
    "new_rank of diffusers": Run("diffusers", {"new_rank": 4}),
    "new_rank of peft in fp16": Run("peft", {"new_rank": 3, "new_conv_rank": 2}),
    "rank_ratio": Run("kohya", {"rank_ratio": 0.5, "min_rank": 1}),
    "norm_threshold": Run("kohya", {"norm_threshold": 0.1, "min_rank": 0}),
    "sv_ratio": Run("kohya", {"dynamic_method": "sv_ratio", "dynamic_param": 3.0}),
    "sv_fro": Run("diffusers", {"dynamic_method": "sv_fro", "dynamic_param": 0.93}),
    "sv_cumulative": Run("peft", {"dynamic_method": "sv_cumulative", "dynamic_param": 0.8}),
    "energy": Run("kohya", {"dynamic_method": "energy", "dynamic_param": 0.9}),
    "knee": Run("kohya", {"dynamic_method": "knee"}),
    "layer_threshold": Run("kohya", {"layer_threshold": 0.02, "new_rank": 6}),
    "channel_threshold": Run("kohya", {"bits": 8, "channel_threshold": 0.9}),
    "target_size, plain": Run("kohya", {"target_size": "8kB"}),
    "target_error, plain": Run("kohya", {"target_error": 0.2}),
    "target_error by parts": Run("diffusers", {"target_error_unet": 0.1, "target_error_text_encoder": 0.3}),
    **{f"int{bits}": Run("kohya", {"bits": bits}) for bits in (2, 3, 4, 5, 6, 8)},
    "int4 in groups of 32": Run("peft", {"bits": 4, "group_size": 32, "rank_ratio": 0.5, "min_rank": 2}),
    "static": Run("kohya", {"bits": 5, "strategy": "static", "scale": 0.125}),
    "nf4": Run("diffusers", {"bits": 4, "strategy": "nf4"}),
    "mixed": Run("kohya", {"bits": 4.2, "strategy": "mixed"}),
    "mixed, target_size": Run("peft", {"target_size": "3500", "strategy": "mixed"}),
    "mixed, target_error": Run("kohya", {"target_error": 0.1, "strategy": "mixed"}),
    "entropy": Run("kohya", {"bits": 3, **_ENTROPY}),
    "entropy, not refined": Run("kohya", {"bits": 3, "refine": False, **_ENTROPY}),
    "entropy, target_size": Run("kohya", {"target_size": "5kB", **_ENTROPY}),
    "entropy, target_error": Run("peft", {"target_error": 0.1, **_ENTROPY}),
    "progressive": Run("kohya", {"bits": 4, "progressive": True, **_ENTROPY}),
    "progressive, cut": Run("kohya", {"bits": 4, "progressive": True, **_ENTROPY}, then="truncate"),
    "fp16": Run("kohya", {"new_rank": 4}, {"save_dtype": torch.float16}),
    "bf16": Run("diffusers", {"new_rank": 4}, {"save_dtype": torch.bfloat16}),
    "fp8": Run("kohya", {"save_format": "fp8"}),
    "fp8 of fewer components": Run("kohya", {"save_format": "fp8", "new_rank": 5}),
    "both": Run("kohya", {"bits": 4, "save_format": "both"}),
    "for five programs": Run("kohya alone", {"new_rank": 4}, {"consumers": ("comfyui", "a1111", "forge", "invokeai", "sdcpp")}),
    "for diffusers 0.32": Run("kohya alone", {"rank_ratio": 0.5, "min_rank": 1}, {"consumers": ("diffusers-0.32",)}),
    "expand of int4": Run("peft", {"bits": 4}, then="expand"),
    "expand of entropy": Run("kohya", {"bits": 3, "refine": False, **_ENTROPY}, then="expand"),
    "in memory, plain": Run("kohya", {"new_rank": 4}, then="memory"),
    "in memory, both": Run("kohya", {"bits": 6, "save_format": "both"}, then="memory"),
}
CLOSE = "entropy, target_error"  # the one run whose bytes depend on the last digit of a step that is searched for
