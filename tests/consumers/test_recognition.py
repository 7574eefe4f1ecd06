"""Each program's own test of what a file is says the same before pruning and after, where everything it looks for is weak."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from consumers.conftest import absent
from core.factories import random_update
from core.test_marks import FILES, weak_and_strong
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_compress import CompressionSettings, compress_file

Tensors = Mapping[str, Tensor]


def pruned(tensors: Tensors, folder: Path) -> dict[str, Tensor]:
    """Without every module that is weak, but for those by which the file is recognised."""
    save_file(dict(tensors), folder / "in.safetensors")
    settings = CompressionSettings.parse({"layer_threshold": 0.01, "rank_ratio": 0.9})
    compress_file(folder / "in.safetensors", folder / "out.safetensors", settings, save_dtype=torch.float32)
    return load_file(folder / "out.safetensors")


def with_weak_ones(name: str) -> dict[str, Tensor]:
    """A file of test_marks and further modules as weak as its marks, under names that no program looks for."""
    keys, marks, others = FILES[name]
    tensors = weak_and_strong(name)
    for number, module in enumerate(others):
        weak = module.replace("0", "7").replace("1", "8").replace("2", "9")
        update = random_update(6, 32, 24, (), 6.0, 50 + number, 1e-3)
        tensors |= dict(zip(keys(weak), (update.down.contiguous(), update.up.contiguous()), strict=True))
        if f"{marks[0]}.alpha" in tensors:
            tensors[f"{weak}.alpha"] = torch.tensor(6.0)
    return tensors


@pytest.mark.parametrize("name", ["Wan Fun", "BFL control", "USO"])
def test_comfyui_converts_the_same_files(comfyui: Path, name: str, tmp_path: Path) -> None:
    """Which of its conversions is chosen shows in the prefix of the keys."""
    from comfy.lora_convert import convert_lora

    tensors = with_weak_ones(name)
    if name == "BFL control":
        tensors["single_blocks.0.norm.key_norm.scale"] = torch.ones(8)
    after = pruned(tensors, tmp_path)
    assert len(after) < len(tensors)
    prefix = "lora_unet_blocks_" if name == "Wan Fun" else "diffusion_model."
    for file in (tensors, after):
        assert all(key.startswith(prefix) for key in convert_lora(dict(file)))


def invokeai(module: str) -> ModuleType:
    """One file of InvokeAI's conversions, in which nothing of the rest of it is needed but what it imports."""
    if not os.environ.get("INVOKEAI_DIR"):
        absent("InvokeAI is absent: set INVOKEAI_DIR to the folder that holds its package")
    sys.path.append(os.environ["INVOKEAI_DIR"])
    try:
        return importlib.import_module(f"invokeai.backend.patches.lora_conversions.{module}")
    finally:
        sys.path.remove(os.environ["INVOKEAI_DIR"])


def test_invokeai_knows_flux_in_the_names_of_diffusers(tmp_path: Path) -> None:
    is_flux = invokeai("flux_diffusers_lora_conversion_utils").is_state_dict_likely_in_flux_diffusers_format
    tensors = with_weak_ones("FLUX.1 of diffusers")
    after = pruned(tensors, tmp_path)
    assert len(after) < len(tensors) and is_flux(tensors) and is_flux(after)
    assert not is_flux({key: tensor for key, tensor in after.items() if "add_q_proj" not in key})
