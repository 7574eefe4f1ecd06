"""Files: what `save` writes `load_lora` reads, and what is no LoRA is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from core.factories import mixed_updates, random_update
from safetensors import safe_open
from safetensors.torch import save_file

from lora_compress import (
    CompressionSettings,
    FormatError,
    LowRankUpdate,
    as_kohya,
    compress,
    is_packed,
    kohya_partner,
    load_lora,
    save,
)

SETTINGS = [
    {"bits": 4},
    {"bits": 8, "strategy": "static"},
    {"bits": 4, "strategy": "nf4", "rank_ratio": 0.3, "min_rank": 1},
    {"bits": 4, "save_format": "both"},
    {"bits": 4, "save_format": "kohya"},
    {"save_format": "fp8"},
    {"rank_ratio": 0.5},
    {},
]


def assert_same(found: dict[str, LowRankUpdate], wanted: dict[str, LowRankUpdate]) -> None:
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert torch.equal(found[name].down.float(), update.down.float()), name
        assert torch.equal(found[name].up.float(), update.up.float()), name
        assert found[name].alpha == update.alpha, name
        assert found[name].down.shape == update.down.shape, name
        assert found[name].up.shape == update.up.shape, name


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_a_saved_file_loads_as_what_was_compressed(values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    settings = CompressionSettings.parse(values)
    lora = compress(mixed_updates(), settings, torch.float16, {"ss_base_model_version": "sd_v1"})
    save(lora, path, torch.float16)
    loaded = load_lora(path)
    assert_same(loaded.updates, lora.updates)
    assert loaded.others == {}
    assert loaded.metadata["ss_base_model_version"] == "sd_v1"
    assert loaded.packed == is_packed(path) == (settings.save_format in ("packed", "both"))
    assert kohya_partner(path).exists() == (settings.save_format == "both")
    assert not list(tmp_path.glob(".*"))


def test_the_partner_holds_the_same_weights_in_kohyas_keys(tmp_path: Path) -> None:
    lora = compress(mixed_updates(), CompressionSettings.parse({"bits": 4, "save_format": "both"}))
    save(lora, tmp_path / "a.v1.safetensors", torch.float32)
    partner = load_lora(tmp_path / "a.v1.kohya.safetensors")
    assert not partner.packed
    for name, update in lora.updates.items():
        torch.testing.assert_close(partner.updates[name].dense(), update.dense(), rtol=1e-5, atol=1e-7)


def test_a_packed_file_is_known_without_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    lora = compress(mixed_updates(), CompressionSettings.parse({"bits": 4}))
    save_file(lora.tensors, path)
    assert is_packed(path)
    assert load_lora(path).packed
    assert_same(load_lora(path).updates, lora.updates)


def test_other_tensors_are_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    lora = compress({"lora_unet_a": random_update()}, CompressionSettings.parse({"bits": 8}))
    save_file({**lora.tensors, "emb_params": torch.ones(3, 4)}, path)
    assert torch.equal(load_lora(path).others["emb_params"], torch.ones(3, 4))


@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_pickled_weights_load(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"lora.{suffix}"
    updates = mixed_updates()
    torch.save(as_kohya(updates), path)
    assert_same(load_lora(path).updates, updates)
    assert not is_packed(path)


class _Trap:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("pickles may run anything",)


def _write_bad(kind: str, folder: Path) -> tuple[Path, str]:
    """A path that cannot be loaded, and what the error must say besides the path."""
    path = folder / "lora.safetensors"
    lora = compress({"lora_unet_a": random_update()}, CompressionSettings.parse({"bits": 8}))
    match kind:
        case "missing":
            return path, "no such file"
        case "missing pickle":
            return folder / "lora.pt", "no such file"
        case "folder":
            path.mkdir()
            return path, "no such file"
        case "text":
            path.write_text("this is not it")
            return path, "no safetensors file"
        case "empty":
            path.touch()
            return path, "no safetensors file"
        case "truncated":
            save(lora, path)
            path.write_bytes(path.read_bytes()[:-7])
            return path, "cut short"
        case "truncated header":
            save(lora, path)
            path.write_bytes(path.read_bytes()[:40])
            return path, "cut short"
        case "version":
            save_file(lora.tensors, path, {"lora_compress_format": "2"})
            return path, "packed format 2.* reads 1: update LoRA Compress"
        case "record":
            save_file({key: tensor[:-1] for key, tensor in lora.tensors.items()}, path, {"lora_compress_format": "1"})
            return path, "its index cannot be read"
        case "lonely down":
            save_file({"lora_unet_a.lora_down.weight": torch.zeros(4, 3)}, path)
            return path, "lora_unet_a.lora_up.weight: is missing"
        case "pickle list":
            torch.save([torch.zeros(3)], folder / "lora.pt")
            return folder / "lora.pt", "holds a list"
        case "pickle code":
            torch.save({"a": _Trap()}, folder / "lora.ckpt")
            return folder / "lora.ckpt", "cannot be read as weights alone.*convert it to .safetensors"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *("missing", "missing pickle", "folder", "text", "empty", "truncated", "truncated header"),
        *("version", "record", "lonely down", "pickle list", "pickle code"),
    ],
)
def test_what_is_no_lora_is_refused_with_its_path(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, message = _write_bad(kind, tmp_path)
    with pytest.raises(FormatError, match=f"(?s)^{path}: .*{message}"):
        load_lora(path)
    assert "run anything" not in capsys.readouterr().out


def test_metadata_tells_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    report = save(compress(mixed_updates(), CompressionSettings.parse({"bits": 4, "rank_ratio": 0.5, "min_rank": 1})), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["lora_compress_format"] == "1"
    told = {key.removeprefix("ss_compress_"): value for key, value in metadata.items() if key.startswith("ss_compress_")}
    assert told == {
        "rank_ratio": "0.5",
        "norm_threshold": "0.0",
        "min_rank": "1",
        "bits": "4",
        "strategy": "dynamic",
        "group_size": "64",
        "save_format": "packed",
        "modules": "4/4",
        "components": f"{report.total.components[1]}/32",
        "relative_error": f"{report.total.relative_error:.6e}",
    }
    assert json.loads(told["components"].split("/")[0]) == sum(update.rank for update in load_lora(path).updates.values())
