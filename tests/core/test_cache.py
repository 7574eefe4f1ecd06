"""One cache folder for everything that is kept: features of data sets and norms of base models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_compress.settings.cache_folder import cache_folder
from lora_compress.weighting import base_norms


def test_the_folder_is_the_named_one_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORA_COMPRESS_CACHE", raising=False)
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "user" / "lora-compress"
    monkeypatch.setenv("LORA_COMPRESS_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_norms_of_base_models_are_kept_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_COMPRESS_CACHE", str(tmp_path / "own"))
    save_file({"model.diffusion_model.middle_block.1.proj_in.weight": torch.eye(4)}, tmp_path / "base.safetensors")
    found = base_norms(tmp_path / "base.safetensors", ["lora_unet_middle_block_1_proj_in"])
    assert found and [path.suffix for path in (tmp_path / "own").iterdir()] == [".json"]
