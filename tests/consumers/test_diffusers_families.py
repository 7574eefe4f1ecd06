"""Files of kohya's and of PEFT's layout, with ranks and alphas that differ, in the converters that diffusers has for each family.

What `load_lora_weights` makes of a file written with `--for` this release is compared, layer by layer, with plain arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from consumers.test_diffusers import attached
from consumers.test_matrix import RELEASE, VERSION, apart
from core.factories import dense, random_update
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_compress import CompressionSettings, LowRankUpdate, SettingsError, as_kohya, compress_file


@pytest.fixture(autouse=True, scope="module")
def _importable() -> None:
    from library.compress_torchvision import declare_missing_operators

    declare_missing_operators()


def narrow(pipeline: str, model: str, parts: int, **config: Any) -> Any:
    """A pipeline that has a transformer with random weights alone; `parts` is the number of text encoders that it leaves out."""
    torch.manual_seed(0)
    numbers = ("", *(f"_{number}" for number in range(2, parts + 1)))
    absent = dict.fromkeys(["vae", *(f"{what}{number}" for number in numbers for what in ("text_encoder", "tokenizer"))])
    transformer = getattr(diffusers, model)(**config)
    return getattr(diffusers, pipeline)(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer, **absent)


def flux() -> Any:
    heads = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    config = heads | {"in_channels": 16, "num_layers": 2, "num_single_layers": 1, "axes_dims_rope": (4, 14, 14)}
    return narrow("FluxPipeline", "FluxTransformer2DModel", 2, **config)


def flux2() -> Any:
    heads = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32}
    config = heads | {"in_channels": 16, "num_layers": 2, "num_single_layers": 1, "axes_dims_rope": (8, 8, 8, 8)}
    return narrow("Flux2Pipeline", "Flux2Transformer2DModel", 1, **config)


def wan() -> Any:
    heads = {"attention_head_dim": 12, "num_attention_heads": 2, "text_dim": 32, "freq_dim": 32, "ffn_dim": 48}
    return narrow("WanPipeline", "WanTransformer3DModel", 1, **heads, in_channels=4, out_channels=4, num_layers=2)


def qwen_image() -> Any:
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
    return narrow("QwenImagePipeline", "QwenImageTransformer2DModel", 1, **heads, in_channels=16, out_channels=4, num_layers=2)


def z_image() -> Any:
    config = {"in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32}
    return narrow("ZImagePipeline", "ZImageTransformer2DModel", 1, **config, axes_dims=[8, 8, 8], axes_lens=[64, 32, 32])


def sd3() -> Any:
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 32}
    config = heads | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "pooled_projection_dim": 32}
    return narrow("StableDiffusion3Pipeline", "SD3Transformer2DModel", 3, **config)


def of_wan(name: str) -> list[str]:
    """blocks.0.attn1.to_q as musubi-tuner names it."""
    theirs = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    theirs |= {"ffn.net.0.proj": "ffn_0", "ffn.net.2": "ffn_2"}
    return [re.sub("|".join(map(re.escape, theirs)), lambda match: theirs[match[0]], name).replace(".", "_")]


_FUSED = {"img_attn_qkv": "attn.to_{}", "txt_attn_qkv": "attn.add_{}_proj"}
_SINGLE = {"attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj"}
FLUX = _SINGLE | {"ff.net.0.proj": "img_mlp_0", "ff.net.2": "img_mlp_2", "ff_context.net.0.proj": "txt_mlp_0"}
FLUX |= {"ff_context.net.2": "txt_mlp_2", "norm1.linear": "img_mod_lin", "norm1_context.linear": "txt_mod_lin"}
FLUX2 = _SINGLE | {"ff.linear_in": "img_mlp_0", "ff.linear_out": "img_mlp_2", "ff_context.linear_in": "txt_mlp_0"}
FLUX2 |= {"ff_context.linear_out": "txt_mlp_2"}


def double_blocks(single: Mapping[str, str]) -> Callable[[Any], dict[str, list[str]]]:
    """{kohya's name: the layers of diffusers that it is made of} for the blocks that FLUX.1 and FLUX.2 share."""

    def names(pipe: Any) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for number in range(len(pipe.transformer.transformer_blocks)):
            at = f"transformer_blocks.{number}."
            found |= {f"double_blocks_{number}_{ours}": [at + theirs] for theirs, ours in single.items()}
            for ours, theirs in _FUSED.items():
                found[f"double_blocks_{number}_{ours}"] = [at + theirs.format(letter) for letter in "qkv"]
        return found

    return names


def same_names(pattern: str) -> Callable[[Any], dict[str, list[str]]]:
    """Kohya's names are those of diffusers with underscores."""

    def names(pipe: Any) -> dict[str, list[str]]:
        layers = pipe.transformer.named_modules()
        return {name.replace(".", "_"): [name] for name, m in layers if isinstance(m, nn.Linear) and re.match(pattern, name)}

    return names


def wan_names(pipe: Any) -> dict[str, list[str]]:
    pattern = re.compile(r"blocks\.\d+\.(attn|ffn)")
    return {of_wan(n)[0]: [n] for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear) and pattern.match(n)}


@dataclass(frozen=True)
class Family:
    """A pipeline, and the layers of its transformer by kohya's names without the prefix."""

    make: Callable[[], Any]
    names: Callable[[Any], dict[str, list[str]]]
    since: tuple[int, int]


FAMILIES = {
    "flux": Family(flux, double_blocks(FLUX), (0, 32)),
    "wan": Family(wan, wan_names, (0, 34)),
    "qwen_image": Family(qwen_image, same_names(r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)"), (0, 35)),
    "flux2": Family(flux2, double_blocks(FLUX2), (0, 38)),
    "z_image": Family(z_image, same_names(r"layers\.\d+\.(attention|feed_forward)"), (0, 38)),
}


def updates_of(family: Family, pipe: Any) -> tuple[dict[str, LowRankUpdate], dict[str, Tensor]]:
    """An update for each of the names, of ranks 2 to 7 and alphas of their own, and what each layer of diffusers should get."""
    layers = dict(pipe.transformer.named_modules())
    updates, wanted = {}, {}
    for number, (name, parts) in enumerate(family.names(pipe).items()):
        shapes = [layers[part].weight.shape for part in parts]
        rank, out = 2 + number % 6, sum(shape[0] for shape in shapes)
        update = updates[f"lora_unet_{name}"] = random_update(rank, shapes[0][1], out, (), 0.5 + number % 4, number, 0.1)
        pieces = dense(update).split([shape[0] for shape in shapes])
        wanted |= dict(zip((part.replace(".", "_") for part in parts), pieces, strict=True))
    return updates, wanted


def loaded(make: Callable[[], Any], path: Path) -> dict[str, Tensor]:
    pipe = make()
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return dict(attached(pipe.transformer, ""))


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def compressed(source: Path, target: Path, **settings: object) -> Any:
    settings = settings or {"rank_ratio": 0.8, "min_rank": 1}
    parsed = CompressionSettings.parse({**settings, "allow_larger": True})  # equal ranks take more room than these few layers
    return compress_file(source, target, parsed, save_dtype=torch.float32, consumers=(RELEASE,))


@pytest.mark.parametrize("name", FAMILIES)
def test_kohya_files_get_to_every_layer(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    if family.since > VERSION:
        pytest.skip(f"diffusers {diffusers.__version__} does not convert kohya's layout of {name}")
    updates, wanted = updates_of(family, family.make())
    source, target = write(tmp_path / "lora.safetensors", as_kohya(updates)), tmp_path / "small.safetensors"
    report = compressed(source, target)
    assert apart(loaded(family.make, target), wanted) == pytest.approx(report.relative_error, rel=0.02)
    assert 0.02 < report.relative_error < 0.6


SINCE = {flux: 32, sd3: 32, wan: 34, qwen_image: 35}  # the release of diffusers that has the model


@pytest.mark.parametrize(("make", "since"), SINCE.items(), ids=[make.__name__ for make in SINCE])
def test_files_of_diffusers_own_layout_get_to_every_layer(make: Callable[[], Any], since: int, tmp_path: Path) -> None:
    if (0, since) > VERSION:
        pytest.skip(f"diffusers {diffusers.__version__} has no such pipeline")
    tensors, wanted = {}, {}
    layers = [(n, m) for n, m in make().transformer.named_modules() if isinstance(m, nn.Linear) and "blocks." in n]
    for number, (layer, module) in enumerate(layers):
        out, inputs = module.weight.shape
        update = random_update(2 + number % 6, inputs, out, (), float(2 + number % 6), number, 0.1)  # alpha is the rank
        tensors |= {f"transformer.{layer}.lora_A.weight": update.down, f"transformer.{layer}.lora_B.weight": update.up}
        wanted[layer.replace(".", "_")] = dense(update)
    source, target = write(tmp_path / "lora.safetensors", tensors), tmp_path / "small.safetensors"
    report = compressed(source, target)
    assert apart(loaded(make, target), wanted) == pytest.approx(report.relative_error, rel=0.02)


def kohya_file(path: Path, names: list[str]) -> Path:
    updates = {name: random_update(4, 1536, 1536, (), 4.0, number, 0.1) for number, name in enumerate(names)}
    return write(path, as_kohya(updates))


def test_kohya_files_that_it_does_not_convert_are_refused_before_it_sees_them(tmp_path: Path) -> None:
    """Of SD3 it loads nothing, without an error."""
    source = kohya_file(tmp_path / "lora.safetensors", [f"lora_unet_joint_blocks_{i}_x_block_attn_proj" for i in range(2)])
    with pytest.raises(SettingsError, match="loads nothing of sd3 files in kohya's layout"):
        compressed(source, tmp_path / "small.safetensors")
    assert loaded(sd3, source) == {}


def test_wan_files_with_a_hole_are_refused_before_it_sees_them(tmp_path: Path) -> None:
    if FAMILIES["wan"].since > VERSION:
        pytest.skip(f"diffusers {diffusers.__version__} has no such pipeline")
    updates, _ = updates_of(FAMILIES["wan"], wan())
    del updates["lora_unet_blocks_1_ffn_0"]
    source = write(tmp_path / "lora.safetensors", as_kohya(updates))
    with pytest.raises(SettingsError, match="lora_unet_blocks_1_ffn_0 missing"):
        compressed(source, tmp_path / "small.safetensors", new_rank=2)
    with pytest.raises((KeyError, ValueError)):
        loaded(wan, source)
