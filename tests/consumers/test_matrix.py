"""Every format of a file x every family of model x both ways into diffusers: the layers get what the file holds.

Files that are said to open as they are go through `load_lora_weights` of diffusers, packed ones through our `load_lora`, and made
plain for this release through diffusers again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from consumers.pipelines import flux, sdxl, tiny_sd
from consumers.test_diffusers import attached, flux_updates, varied, write
from core.factories import dense
from torch import Tensor

from lora_compress import CompressionSettings, LowRankUpdate, SettingsError, compress_file
from lora_compress.diffusers import load_lora

VERSION = tuple(int(number) for number in diffusers.__version__.split(".")[:2])
RELEASE = "diffusers-0.32" if VERSION == (0, 32) else "diffusers-0.40" if VERSION >= (0, 40) else "diffusers"

FORMATS: dict[str, dict[str, object]] = {
    "kohya": {"rank_ratio": 0.8, "min_rank": 1},
    "fp8": {"rank_ratio": 0.8, "min_rank": 1, "save_format": "fp8"},
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "nf4": {"bits": 4, "strategy": "nf4", "group_size": 64},
    "mixed": {"bits": 4, "strategy": "mixed"},
    "entropy": {"bits": 4, "strategy": "entropy"},
    "progressive": {"bits": 4, "strategy": "entropy", "progressive": True},
}
PACKED = set(FORMATS) - {"kohya", "fp8"}


def trained(pipe: Any) -> dict[str, LowRankUpdate]:
    """Updates of those layers that sd-scripts trains: what lies beside the blocks is not known to diffusers by kohya's names."""
    return {name: update for name, update in varied(pipe).items() if name.startswith("lora_te_") or "_blocks_" in name}


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, LowRankUpdate]]]] = {
    "sd": (tiny_sd, trained),
    "sdxl": (sdxl, trained),
    "flux": (flux, lambda pipe: flux_updates(64, 2)),  # diffusers' own converter knows the full width alone: ours only
}


@pytest.fixture(autouse=True, scope="module")
def _importable() -> None:
    from library.compress_torchvision import declare_missing_operators

    declare_missing_operators()


def deltas(pipe: Any) -> dict[str, Tensor]:
    """What the layers of a pipeline have got, dense."""
    models = {name: getattr(pipe, name, None) for name in ("unet", "transformer", "text_encoder")}
    return {key: value for name, model in models.items() if model is not None for key, value in attached(model, f"{name}.")}


def loaded(make: Callable[[], Any], path: Path, ours: bool) -> dict[str, Tensor]:
    """The same, of a pipeline that has loaded a file."""
    pipe = make()
    if ours:
        load_lora(pipe, path)
    else:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return deltas(pipe)


def norm(parts: dict[str, Tensor]) -> float:
    return sum(float(part.square().sum()) for part in parts.values()) ** 0.5


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """||first - second|| / ||second||; a module that a file leaves out is zero."""
    names = first.keys() | second.keys()
    zero = torch.zeros(())
    return norm({name: first.get(name, zero) - second.get(name, zero) for name in names}) / norm(second)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMATS)
def test_layers_get_what_the_file_holds(form: str, family: str, tmp_path: Path) -> None:
    make, updates_for = FAMILIES[family]
    updates = updates_for(make())
    source, target = write(tmp_path / "lora.safetensors", updates), tmp_path / "small.safetensors"
    if (form, family) == ("fp8", "flux"):
        with pytest.raises(SettingsError, match="fp8"):
            convert(source, target, FORMATS[form], (RELEASE,))
        return
    report = convert(source, target, FORMATS[form], () if form in PACKED else (RELEASE,))
    whole, found = loaded(make, source, ours=True), loaded(make, target, ours=True)
    assert norm(whole) == pytest.approx(norm({name: dense(update) for name, update in updates.items()}), rel=1e-4)
    assert apart(found, whole) == pytest.approx(report.relative_error, rel=0.02, abs=1e-5)
    plain = target
    if form in PACKED:
        plain = tmp_path / "plain.safetensors"
        convert(target, plain, {}, (RELEASE,))
    assert apart(loaded(make, plain, ours=family == "flux"), found) < 1e-4


def convert(source: Path, target: Path, settings: dict[str, object], consumers: tuple[str, ...]) -> Any:
    """Compress, with factors in float32."""
    return compress_file(
        source, target, CompressionSettings.parse({**settings, "allow_larger": True}), save_dtype=torch.float32, consumers=consumers
    )


def test_a_naive_file_is_scaled_wrong_and_ours_is_not(tmp_path: Path) -> None:
    """Ranks and alphas that differ from module to module: diffusers, whatever its release, takes some for others."""
    naive, ours = write(tmp_path / "naive.safetensors", trained(tiny_sd())), tmp_path / "ours.safetensors"
    convert(naive, ours, {}, (RELEASE,))
    wanted = loaded(tiny_sd, naive, ours=True)
    assert apart(loaded(tiny_sd, naive, ours=False), wanted) > 0.05
    assert apart(loaded(tiny_sd, ours, ours=False), wanted) < 1e-4
