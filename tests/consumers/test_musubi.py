"""musubi-tuner's own merge of a LoRA into a model: what it makes of our plain files, and why fp8 is refused for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from consumers.conftest import absent
from core.factories import dense, random_update
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_compress import CompressionSettings, SettingsError, as_kohya, compress_file, load_lora

LAYERS = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("self_attn.q", "cross_attn.k", "ffn.0", "ffn.2")]


@pytest.fixture
def merge() -> Iterator[Callable[..., dict[str, Tensor]]]:
    """`load_safetensors_with_lora_and_fp8` of the checkout that MUSUBI_DIR names."""
    if not os.environ.get("MUSUBI_DIR"):
        absent("musubi-tuner is absent: set MUSUBI_DIR to a checkout of it")
    source = str(Path(os.environ["MUSUBI_DIR"]) / "src")
    sys.path.append(source)
    from musubi_tuner.utils.lora_utils import load_safetensors_with_lora_and_fp8

    yield load_safetensors_with_lora_and_fp8
    sys.path.remove(source)


def merged(merge: Any, folder: Path, lora: Path) -> dict[str, Tensor]:
    return dict(merge(str(folder / "base.safetensors"), [load_file(lora)], [1.0], False, torch.device("cpu")))


def files(folder: Path) -> Path:
    """A base model, and a LoRA of ranks and alphas that differ."""
    base, updates = {}, {}
    for number, layer in enumerate(LAYERS):
        base[f"{layer}.weight"] = torch.randn(40, 32, generator=torch.Generator().manual_seed(number))
        name = "lora_unet_" + layer.replace(".", "_")
        updates[name] = random_update(3 + number % 4, 32, 40, (), 1.0 + number % 3, number, 0.1)
    save_file(base, folder / "base.safetensors")
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def test_the_merge_adds_what_the_file_holds(merge: Any, tmp_path: Path) -> None:
    source, target = files(tmp_path), tmp_path / "small.safetensors"
    settings = CompressionSettings.parse({"rank_ratio": 0.7, "min_rank": 1})
    compress_file(source, target, settings, save_dtype=torch.float32, consumers=("musubi",))
    base, found = load_file(tmp_path / "base.safetensors"), merged(merge, tmp_path, target)
    updates = load_lora(target).updates
    assert len(updates) == len(LAYERS)
    for layer in LAYERS:
        wanted = base[f"{layer}.weight"] + dense(updates["lora_unet_" + layer.replace(".", "_")]).float()
        torch.testing.assert_close(found[f"{layer}.weight"], wanted, rtol=1e-4, atol=1e-5)


def test_float8_is_refused_for_it_because_its_merge_fails(merge: Any, tmp_path: Path) -> None:
    source, target = files(tmp_path), tmp_path / "small.safetensors"
    settings = CompressionSettings.parse({"save_format": "fp8"})
    with pytest.raises(SettingsError, match="musubi-tuner multiplies factors in the precision of the file"):
        compress_file(source, target, settings, consumers=("musubi",))
    compress_file(source, target, settings)
    with pytest.raises((RuntimeError, NotImplementedError)):
        merged(merge, tmp_path, target)
