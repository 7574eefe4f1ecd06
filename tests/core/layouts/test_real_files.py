"""Real files that people trained, where a folder of them is at hand: every one is read, and a smaller copy is as strong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_compress import CompressionSettings, open_lora
from lora_compress.engine.to_file import compress_file
from lora_compress.inspection.comparison import compare_files

FILES = {  # layout, family, modules, other tensors
    "cloneofsimo_analog_svd_rank4.safetensors": ("cloneofsimo", "sd1", 192, 0),
    "cloneofsimo_lora_disney.safetensors": ("cloneofsimo", "sd1", 192, 2),
    "cloneofsimo_lora_kiriko2.text_encoder.pt": ("cloneofsimo", "sd1", 48, 0),
    "cloneofsimo_lora_pop.pt": ("cloneofsimo", "sd2", 128, 0),
    "diffusers_attn_processors.safetensors": ("diffusers", "sd1", 128, 0),
    "diffusers_course_seed1337.safetensors": ("diffusers", "sd1", 128, 0),
    "diffusers_pokemon_seed42.safetensors": ("diffusers", "sd1", 128, 0),
    "lycoris_smart_falcon_4_lokr.safetensors": ("lokr", "sd1", 350, 0),
    "lycoris_smart_falcon_8_lokr.safetensors": ("lokr", "sd1", 350, 0),
    "peft_clip_text_encoder/adapter_model.safetensors": ("peft", "sd1", 24, 0),
    "peft_unet_partly_zero/adapter_model.safetensors": ("peft", "sd1", 128, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_is_read(name: str, real_lora: Callable[[str], Path]) -> None:
    with open_lora(real_lora(name)) as source:
        assert (source.layout, source.family, len(source), len(source.others)) == FILES[name]
        parts = {source.part(module) for module in source}
        assert parts <= {"U-Net", "text encoder"} and all(torch.isfinite(source[module].down).all() for module in [*source][:9])


@pytest.mark.parametrize("name", [name for name in FILES if "lokr" not in name and "svd" not in name])
def test_a_smaller_copy_has_the_error_that_is_stated(name: str, real_lora: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = real_lora(name), tmp_path / "out.safetensors"
    report = compress_file(source, out, CompressionSettings.parse({"target_error": 0.3}))
    assert report.status == "written"
    assert compare_files(str(source), str(out)).relative_error == pytest.approx(report.relative_error, rel=1e-4, abs=1e-7)
