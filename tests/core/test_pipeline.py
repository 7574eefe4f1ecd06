"""The whole road: what the report says is what the written file is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core.factories import dense, dense_error, mixed_updates, random_update, update_of_spectrum

from lora_compress import CompressionSettings, SettingsError, compress, estimate_size, kohya_partner, load_lora, opened_by, save

EVERY = [
    {},
    {"rank_ratio": 0.5},
    {"save_format": "fp8"},
    {"save_format": "fp8", "rank_ratio": 0.3, "min_rank": 1},
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "group_size": 16, "rank_ratio": 0.6},
    {"bits": 4, "strategy": "nf4"},
    {"bits": 8, "strategy": "static"},
    {"bits": 4, "strategy": "static", "scale": 0.02},
    {"bits": 4, "save_format": "both"},
    {"bits": 4, "strategy": "nf4", "save_format": "kohya"},
    {"norm_threshold": 0.5, "min_rank": 0},
]
every_setting = pytest.mark.parametrize("values", EVERY, ids=str)


@every_setting
def test_report_tells_error_bytes_and_counts_of_the_written_file(values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    updates = mixed_updates()
    report = save(compress(updates, CompressionSettings.parse(values), torch.float16), path, torch.float16)
    written = load_lora(path).updates
    assert report.total.relative_error == pytest.approx(dense_error(updates, written), rel=1e-4)
    assert report.total.relative_error > 0
    assert report.bytes[1] == path.stat().st_size
    assert report.total.modules == (len(updates), len(written))
    nonzero = sum(int(update.down.float().flatten(1).any(dim=1).sum()) for update in written.values())  # rank 1 is padded
    assert report.total.components == (32, nonzero)
    assert set(report.parts) == {"text encoder", "U-Net"}
    te = {name: update for name, update in updates.items() if name.startswith("lora_te")}
    kept_te = {name: update for name, update in written.items() if name.startswith("lora_te")}
    assert report.parts["text encoder"].relative_error == pytest.approx(dense_error(te, kept_te), rel=1e-4)


@every_setting
def test_the_same_input_gives_the_same_bytes(values: dict[str, object], tmp_path: Path) -> None:
    settings = CompressionSettings.parse(values)
    for folder in ("a", "b"):
        lora = compress(mixed_updates(), settings, torch.float16, {"ss_b": "1", "ss_a": "\u00e9"})
        save(lora, tmp_path / folder / "lora.safetensors", torch.float16)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@every_setting
def test_the_input_is_not_touched(values: dict[str, object]) -> None:
    updates, untouched = mixed_updates(), mixed_updates()
    compress(updates, CompressionSettings.parse(values))
    assert all(torch.equal(updates[n].down, u.down) and torch.equal(updates[n].up, u.up) for n, u in untouched.items())


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("extra", [{}, {"bits": 4}], ids=["plain", "int4"])
def test_rank_ratio_is_the_share_of_components_kept(ratio: float, extra: dict[str, object]) -> None:
    settings = CompressionSettings.parse({"rank_ratio": ratio, "min_rank": 0, **extra})
    kept = compress(mixed_updates(rank=10), settings).report.total.components
    assert kept == (40, int(40 * ratio + 1e-9))


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_pruning_alone_loses_exactly_the_weakest_components(ratio: float) -> None:
    updates = mixed_updates()
    lora = compress(updates, CompressionSettings.parse({"rank_ratio": ratio, "min_rank": 0}))
    sigmas = torch.cat([torch.linalg.svdvals(dense(update))[:8] for update in updates.values()]).sort(descending=True).values
    expected = float(sigmas[int(32 * ratio) :].norm() / sigmas.norm())
    assert lora.report.total.relative_error == pytest.approx(expected, rel=1e-5)


def test_without_any_setting_only_rounding_is_lost() -> None:
    lora = compress(mixed_updates(), CompressionSettings.parse({}))
    assert dense_error(mixed_updates(), lora.updates) < 3e-7
    assert {update.rank for update in lora.updates.values()} == {8}


def test_a_kohya_file_under_16_bits_holds_the_dequantized_codes() -> None:
    packed = compress(mixed_updates(), CompressionSettings.parse({"bits": 4}))
    plain = compress(mixed_updates(), CompressionSettings.parse({"bits": 4, "save_format": "kohya"}), torch.float32)
    for name, update in packed.updates.items():
        expected = dense(update)
        torch.testing.assert_close(dense(plain.updates[name]), expected, rtol=0, atol=4e-7 * float(expected.abs().amax()))


@pytest.mark.parametrize(
    "values",
    [{}, {"bits": 8}, {"bits": 4, "rank_ratio": 0.5}, {"bits": 4, "strategy": "nf4", "rank_ratio": 0.25}, {"save_format": "fp8"}]
    + [{"rank_ratio": 0.5}, {"bits": 8, "strategy": "static"}],
    ids=str,
)
def test_estimated_size_is_near_the_real_one_for_flat_spectra(values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    updates = {
        f"lora_unet_{index}": update_of_spectrum([1 + 0.01 * i for i in range(16)], 256 + 64 * (index % 3), 320, seed=index)
        for index in range(12)
    }
    settings = CompressionSettings.parse(values)
    report = save(compress(updates, settings, torch.float16), path, torch.float16)
    assert estimate_size(updates, settings, torch.float16) == pytest.approx(path.stat().st_size, rel=0.1)
    plain = sum(u.down.numel() + u.up.numel() for u in updates.values()) * 2
    assert report.bytes[0] == pytest.approx(plain, rel=0.02)


def test_estimate_is_near_where_every_component_stays() -> None:
    for values in ({"bits": 4}, {"bits": 8, "group_size": 16}, {"bits": 4, "strategy": "nf4"}, {"save_format": "fp8"}):
        settings = CompressionSettings.parse(values)
        wide = {**mixed_updates(), "lora_unet_wide": random_update(rank=30)}  # a rank above the layer's own
        assert estimate_size(wide, settings, None) == pytest.approx(
            compress(wide, settings).report.bytes[1], abs=1000
        )  # of metadata


def test_dropped_modules_are_absent_and_dropping_all_is_refused() -> None:
    updates = {"lora_unet_strong": random_update(), "lora_unet_weak": random_update(magnitude=1e-4)}
    for values in ({}, {"bits": 4}, {"save_format": "fp8"}):
        lora = compress(updates, CompressionSettings.parse({"norm_threshold": 1e-3, **values}))
        assert lora.updates.keys() == {"lora_unet_strong"}
        assert not any("weak" in key for key in lora.tensors)
        assert lora.report.total.modules == (2, 1)
    with pytest.raises(SettingsError, match="pruning removes every module"):
        compress(updates, CompressionSettings.parse({"norm_threshold": 1e6}))


def test_zero_updates_compress_and_load_as_zeros(tmp_path: Path) -> None:
    zero = random_update()
    zero.up.zero_()
    for values in EVERY[:-1]:
        path = tmp_path / "zero.safetensors"
        report = save(compress({"lora_unet_zero": zero}, CompressionSettings.parse(values)), path)
        assert report.total.relative_error == 0.0
        assert float(dense(load_lora(path).updates["lora_unet_zero"]).abs().amax()) == 0.0


def test_parameters_that_still_train_are_compressed_without_gradients(tmp_path: Path) -> None:
    update = random_update()
    update.down.requires_grad_()
    update.up.requires_grad_()
    for values in ({}, {"bits": 4}):
        lora = compress({"lora_unet_a": update}, CompressionSettings.parse(values))
        assert not any(tensor.requires_grad for tensor in lora.tensors.values())
        save(lora, tmp_path / "lora.safetensors")


def test_every_written_file_is_told_with_the_programs_that_open_it(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    for values in ({}, {"save_format": "fp8"}, {"bits": 4}, {"bits": 4, "save_format": "both"}):
        settings = CompressionSettings.parse(values)
        kohya_partner(path).unlink(missing_ok=True)
        save(compress(mixed_updates(), settings), path)
        lines = opened_by(path, str(settings.save_format)).splitlines()
        assert sorted(line.split(" opens in: ")[0] for line in lines) == sorted(str(file) for file in tmp_path.iterdir())
        assert all(("alone" not in line) == (not load_lora(line.split(" opens in: ")[0]).packed) for line in lines)
