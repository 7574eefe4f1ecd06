"""What inspect tells, against dense singular values and brute force."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from core.factories import dense, mixed_updates, update_of_spectrum
from safetensors.torch import save_file

from lora_compress import CompressionSettings, FormatError, as_kohya, compress_file, open_lora, truncate_file
from lora_compress.inspection.file import effective_rank, inspect_file


def test_effective_rank_counts_equal_components() -> None:
    assert effective_rank([3.0] * 7) == pytest.approx(7.0)
    assert effective_rank([5.0, 0.0, 0.0]) == pytest.approx(1.0)
    assert effective_rank([]) == effective_rank([0.0]) == 0.0
    shares = [0.8, 0.2]
    assert effective_rank([2.0, 1.0]) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_modules_are_told_as_they_are(tmp_path: Path) -> None:
    updates = mixed_updates(rank=6)
    path = tmp_path / "a.safetensors"
    save_file(as_kohya(updates), path, {"ss_output_name": "x"})
    found = inspect_file(str(path))
    assert (found.layout, found.dtype, found.bytes, found.ranks) == ("kohya", "float32", path.stat().st_size, (6, 6))
    assert {module.name for module in found.modules} == updates.keys()
    for module in found.modules:
        update = updates[module.name]
        expected = torch.linalg.svdvals(dense(update))[:6]
        assert torch.tensor(module.sigma, dtype=torch.float64).allclose(expected, rtol=1e-9, atol=0)
        assert module.shape == (update.up.shape[0], *update.down.shape[1:])
        assert module.bytes == 4 * (update.numel + 1)
        assert module.norm == pytest.approx(float(dense(update).norm()))
    told = json.loads(json.dumps(found.as_json()))
    assert told["metadata"] == {"ss_output_name": "x"} and len(told["modules"]) == 4


def test_smaller_files_are_what_truncation_gives(tmp_path: Path) -> None:
    """Each point is a choice of ranks: the error is that of some truncation within the budget, and no cheaper one does it.

    In 16 bits, as a budget stores a file of 32.
    """
    sigma = {"lora_unet_a": [4.0, 1.0, 0.5], "lora_unet_b": [3.0, 2.0, 0.1]}
    updates = {name: update_of_spectrum(values, seed=seed) for seed, (name, values) in enumerate(sigma.items())}
    path = tmp_path / "a.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, path)
    total = sum(value**2 for values in sigma.values() for value in values)
    choices = [
        (44 * 2 * (a + b), (sum(v**2 for v in sigma["lora_unet_a"][a:] + sigma["lora_unet_b"][b:]) / total) ** 0.5)
        for a in (1, 2, 3)
        for b in (1, 2, 3)
    ]
    overhead = path.stat().st_size - 2 * 44 * 3 * 4 - 2 * 4
    found = inspect_file(str(path)).curve
    assert found
    for size, error in found:
        weight = size - overhead
        assert any(weight == cost and error == pytest.approx(lost, rel=1e-5) for cost, lost in choices)
        assert not any(cost < weight and lost < error * (1 - 1e-6) for cost, lost in choices)
    assert [size for size, _ in found] == sorted((size for size, _ in found), reverse=True)


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    save_file({"model.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"a\.safetensors: holds no low-rank update"):
        inspect_file(str(tmp_path / "a.safetensors"))


def test_a_cut_file_has_the_ranks_that_are_left(tmp_path: Path) -> None:
    falling = [2.0**-i for i in range(16)]
    updates = {f"lora_unet_{i}": update_of_spectrum(falling, inputs=90, outputs=70, seed=i) for i in range(3)}
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("plain", "whole", "cut")]
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, paths[0])
    settings = CompressionSettings.parse({"strategy": "entropy", "bits": 5, "progressive": True})
    compress_file(paths[0], paths[1], settings)
    whole = inspect_file(paths[1])
    truncate_file(paths[1], paths[2], whole.bytes * 2 // 3)
    cut = inspect_file(paths[2])
    assert cut.ranks[1] < whole.ranks[1]
    assert cut.codec == whole.codec == "entropy" and "entropy" in cut.stored_as
    assert cut.packed_curve and max(size for size, _ in (*cut.curve, *cut.packed_curve)) < cut.bytes
    for module in cut.modules:
        assert len(module.sigma) == module.rank == open_lora(paths[2])[module.name].rank


def test_packed_files_take_what_is_told(tmp_path: Path) -> None:
    updates = {f"lora_unet_{i}": update_of_spectrum([1 / j for j in range(1, 17)], 300, 200, seed=i) for i in range(3)}
    path = tmp_path / "a.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, path, {"ss_note": "x" * 5000})
    told = {error: size for size, error in inspect_file(str(path)).packed_curve}
    for error in (0.05, 0.1, 0.2):
        settings = CompressionSettings.parse({"strategy": "entropy", "target_error": error})
        made = compress_file(path, tmp_path / "out.safetensors", settings)
        assert made.bytes[1] == pytest.approx(told[error], rel=0.1)


@pytest.mark.parametrize(
    ("down", "up", "alpha", "found"),
    [
        (1e-150, 1e-150, 4.0, r"a factor has weights of about 1e-1[45]\d"),
        (1e150, 1.0, 4.0, r"a factor has weights of about 1e\+15\d"),
        (1e-100, 1e-100, 4.0, r"the update has weights of about 1e-(199|200)"),
        (1.0, 1.0, 1e200, r"the update has weights of about 1e\+200"),
    ],
)
def test_an_update_whose_square_is_no_number_is_refused_and_not_called_zero(
    tmp_path: Path, down: float, up: float, alpha: float, found: str
) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 8, dtype=torch.float64) * down,
        f"{name}.lora_up.weight": torch.randn(8, 4, dtype=torch.float64) * up,
        f"{name}.alpha": torch.tensor(alpha, dtype=torch.float64),
    }
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(FormatError, match=f"{name}: {found}"):
        inspect_file(path)


def test_factors_of_opposite_magnitudes_have_a_norm(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    down, up = torch.randn(4, 8, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    tensors = {f"{name}.lora_down.weight": down * 1e-120, f"{name}.lora_up.weight": up * 1e120, f"{name}.alpha": torch.tensor(4.0)}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    assert inspect_file(path).modules[0].norm == pytest.approx(float((up @ down).norm()), rel=1e-9)
