"""The seven functions: what they say they do, on files and on tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core.factories import dense, dense_error, mixed_updates
from safetensors.torch import load_file, save_file

from lora_compress import (
    FormatError,
    SettingsError,
    apply_quantization,
    as_kohya,
    check_quantization_support,
    combined_compression,
    load_compressed_lora,
    load_lora,
    prune_lora_rank,
    quantize_lora_weights,
    save_compressed_lora,
)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(mixed_updates()).items()}, path)
    return path


def test_pruning_a_file_keeps_the_share_that_was_asked_for(lora: Path, tmp_path: Path) -> None:
    report = prune_lora_rank(lora, tmp_path / "out.safetensors", rank_ratio=0.5, min_rank=1)
    kept = load_lora(tmp_path / "out.safetensors").updates
    assert sum(module.rank[1] for module in report.modules) == 16
    assert report.relative_error == pytest.approx(dense_error(mixed_updates(), kept), rel=1e-4)


@pytest.mark.parametrize(("bits", "strategy"), [(8, "dynamic"), (4, "nf4"), (3, "entropy"), (4.5, "mixed"), (4, "static")])
def test_quantizing_a_file_and_tensors_in_memory_give_the_same(bits: float, strategy: str, lora: Path, tmp_path: Path) -> None:
    apply_quantization(lora, tmp_path / "file.safetensors", bits, strategy)
    save_compressed_lora(quantize_lora_weights(load_file(lora), bits, strategy), tmp_path / "memory.safetensors")
    one, other = (load_compressed_lora(tmp_path / f"{name}.safetensors", torch.float32) for name in ("file", "memory"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_cascade_is_smaller_than_either_step(lora: Path, tmp_path: Path) -> None:
    pruned = prune_lora_rank(lora, tmp_path / "a.safetensors", 0.5, min_rank=1)
    coded = apply_quantization(lora, tmp_path / "b.safetensors", 4)
    both = combined_compression(lora, tmp_path / "c.safetensors", 0.5, bits=4, min_rank=1)
    assert both.bytes[1] < min(pruned.bytes[1], coded.bytes[1])
    assert both.relative_error >= max(pruned.relative_error, coded.relative_error)


def test_a_loaded_file_is_a_state_dict(lora: Path, tmp_path: Path) -> None:
    apply_quantization(lora, tmp_path / "out.safetensors", 8)
    tensors = load_compressed_lora(tmp_path / "out.safetensors")
    updates = mixed_updates()
    assert tensors.keys() == load_file(lora).keys()
    for name, update in updates.items():
        down, up, alpha = (tensors[f"{name}.{key}"] for key in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert down.dtype == up.dtype == torch.float16
        found = float(alpha) / len(down) * up.flatten(1).double() @ down.flatten(1).double()
        assert float((found - dense(update)).norm() / dense(update).norm()) < 0.02


def test_what_is_no_lora_and_what_is_no_setting_are_refused(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"lora_weights: 0 modules and 1 tensors .*such as weight"):
        quantize_lora_weights({"weight": torch.zeros(3)})
    with pytest.raises(SettingsError, match="rank_ration: unknown setting, did you mean rank_ratio"):
        apply_quantization(lora, tmp_path / "out.safetensors", 4, rank_ration=0.5)


def test_support_tells_a_reason_for_everything_that_is_not_there() -> None:
    for name, support in check_quantization_support().items():
        assert support.available or support.reason, name
