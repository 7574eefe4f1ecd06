"""load_lora on real pipelines: every layer gets the update of the file, whatever the ranks and alphas, in any release."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from consumers.pipelines import flux, linear_updates, sdxl
from core.factories import dense, random_update
from safetensors.torch import save_file
from torch import Tensor

from lora_compress import CompressionSettings, FormatError, LowRankUpdate, SettingsError, as_kohya, compress_file
from lora_compress import load_lora as read_lora
from lora_compress.diffusers import load_lora
from lora_compress.diffusers.attaching import _pattern
from lora_compress.names.diffusers import find_layers, sgm_name

TINY_SD = Path(__file__).resolve().parents[2] / "assets" / "tiny-sd"


@pytest.fixture(autouse=True, scope="module")
def _importable() -> None:
    from library.compress_torchvision import declare_missing_operators

    declare_missing_operators()


@pytest.fixture
def sd() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(str(TINY_SD), safety_checker=None, torch_dtype=torch.float32)


def write(path: Path, updates: dict[str, LowRankUpdate], **settings: object) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, path)
    if settings:
        packed = path.with_stem(path.stem + "-packed")
        compress_file(path, packed, CompressionSettings.parse({**settings, "allow_larger": True}), save_dtype=torch.float32)
        return packed
    return path


def varied(pipe: Any, seed: int = 0, magnitude: float = 0.1) -> dict[str, LowRankUpdate]:
    """Ranks 1 to 6 and alphas of either sign, over linear layers and convolutions of U-Net and text encoder."""
    updates: dict[str, LowRankUpdate] = {}
    for prefix, model in (("lora_unet_", pipe.unet), ("lora_te_", pipe.text_encoder)):
        modules = model.named_modules() if model is not None else ()
        layers = [(n, m) for n, m in modules if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
        for name, layer in layers[::9]:
            number = len(updates)
            out, inputs, *kernel = layer.weight.shape
            alpha = (0.5 + number % 5) * (-1.0) ** (number % 7 == 0)
            rank = min(1 + number % 6, out, inputs)
            update = random_update(rank, inputs, out, tuple(kernel), alpha, seed + number, magnitude)
            updates[prefix + name.replace(".", "_")] = update
    return updates


def attached(model: torch.nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The updates that PEFT computes, dense, by names with underscores."""
    for name, layer in model.named_modules():
        for adapter in getattr(layer, "lora_A", {}):
            up, down = layer.lora_B[adapter].weight.double().flatten(1), layer.lora_A[adapter].weight.double().flatten(1)
            yield prefix + name.replace(".", "_"), layer.scaling[adapter] * up @ down


def assert_attached(found: dict[str, Tensor], updates: dict[str, LowRankUpdate]) -> None:
    assert found.keys() == updates.keys()
    for name, update in updates.items():
        torch.testing.assert_close(found[name], dense(update), rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"bits": 5, "strategy": "entropy"}], ids=str)
def test_every_layer_gets_the_update_of_the_file(sd: Any, settings: dict[str, object], tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", varied(sd), **settings)
    assert load_lora(sd, path) == "lora_0"
    found = dict(attached(sd.unet, "lora_unet_")) | dict(attached(sd.text_encoder, "lora_te_"))
    assert_attached(found, read_lora(path).updates)


def output(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=generator)
    with torch.no_grad():
        text = pipe.text_encoder(torch.arange(8).unsqueeze(0))[0]
        return pipe.unet(latents, 10, encoder_hidden_states=text).sample


def merged(pipe: Any, *parts: tuple[dict[str, LowRankUpdate], float]) -> Tensor:
    """What the pipeline puts out when the updates are added to its weights by plain arithmetic; it is itself again afterwards."""
    before = {}
    for prefix, model in (("lora_unet_", pipe.unet), ("lora_te_", pipe.text_encoder)):
        layers = {prefix + name.replace(".", "_"): layer for name, layer in model.named_modules()}
        for updates, strength in parts:
            for name in updates.keys() & layers.keys():
                weight: Any = layers[name].weight
                before.setdefault(weight, weight.data)
                weight.data = weight.data + strength * dense(updates[name]).float().reshape(weight.shape)
    try:
        return output(pipe)
    finally:
        for weight, data in before.items():
            weight.data = data


def test_adapters_are_weighed_fused_and_deleted(sd: Any, tmp_path: Path) -> None:
    first, second = varied(sd, magnitude=0.05), varied(sd, 500, 0.05)
    paths = [write(tmp_path / f"{i}.safetensors", u, bits=8) for i, u in enumerate((first, second))]
    one, two = (read_lora(path).updates for path in paths)
    base = output(sd)
    alone, both = merged(sd, (one, 0.5)), merged(sd, (one, 0.7), (two, -0.4))
    close: Callable[[Tensor, Tensor], None] = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # noqa: E731
    load_lora(sd, paths[0], "one", 0.5)
    close(output(sd), alone)
    assert not torch.allclose(alone, base, rtol=1e-2, atol=1e-2)
    load_lora(sd, paths[1], "two")
    sd.set_adapters(["one", "two"], [0.7, -0.4])
    close(output(sd), both)
    sd.fuse_lora(adapter_names=["one", "two"])
    close(output(sd), both)
    sd.unfuse_lora()
    close(output(sd), both)
    sd.delete_adapters("two")
    sd.set_adapters("one", 0.5)
    close(output(sd), alone)
    with pytest.raises(SettingsError, match="there is an adapter of this name"):
        load_lora(sd, paths[1], "one")
    sd.unload_lora_weights()
    close(output(sd), base)


def test_an_adapter_is_swapped_for_a_file_of_smaller_ranks(sd: Any, tmp_path: Path) -> None:
    """In its place: the same parameters hold the other file, zeros where it has less."""
    large = varied(sd, magnitude=0.05)
    small = {name: random_update(1, u.down.shape[1], len(u.up), u.kernel, 2.0, 7, 0.05) for name, u in [*large.items()][::2]}
    paths = [write(tmp_path / f"{i}.safetensors", u, bits=8) for i, u in enumerate((large, small))]
    before, after = (read_lora(path).updates for path in paths)
    with pytest.raises(SettingsError, match="there is no adapter style, only none"):
        load_lora(sd, paths[0], "style", hotswap=True)
    load_lora(sd, paths[0], "style")
    held = {name: parameter.data_ptr() for name, parameter in sd.unet.named_parameters() if ".style." in name}
    load_lora(sd, paths[1], "style", 0.6, hotswap=True)
    assert held == {name: parameter.data_ptr() for name, parameter in sd.unet.named_parameters() if ".style." in name}
    torch.testing.assert_close(output(sd), merged_plain(sd, after, 0.6), rtol=1e-3, atol=1e-3)
    load_lora(sd, paths[0], "style", hotswap=True)
    torch.testing.assert_close(output(sd), merged_plain(sd, before, 1.0), rtol=1e-3, atol=1e-3)
    wide = {name: random_update(u.rank + 1, u.down.shape[1], len(u.up), u.kernel) for name, u in large.items()}
    with pytest.raises(SettingsError, match=r"has rank \d, style has room for \d: load the LoRA with the largest ranks first"):
        load_lora(sd, write(tmp_path / "wide.safetensors", wide), "style", hotswap=True)
    sd.fuse_lora()
    with pytest.raises(SettingsError, match="style is fused"):
        load_lora(sd, paths[1], "style", hotswap=True)


def merged_plain(pipe: Any, updates: dict[str, LowRankUpdate], strength: float) -> Tensor:
    """As `merged`, with the adapters of the pipeline switched off."""
    pipe.disable_lora()
    layers = {
        prefix + name.replace(".", "_"): layer
        for prefix, model in (("lora_unet_", pipe.unet), ("lora_te_", pipe.text_encoder))
        for name, layer in model.named_modules()
    }
    before = {}
    for name, update in updates.items():
        weight: Any = layers[name].base_layer.weight
        before[weight] = weight.data
        weight.data = weight.data + strength * dense(update).float().reshape(weight.shape)
    try:
        return output(pipe)
    finally:
        for weight, data in before.items():
            weight.data = data
        pipe.enable_lora()


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 5, "strategy": "entropy"}], ids=str)
def test_pictures_of_the_packed_file_are_those_of_the_expanded_one(settings: dict[str, object], tmp_path: Path) -> None:
    """By load_lora, and by diffusers' own loader for the drop-in file: at most 1 of 255 apart in any pixel."""
    from diffusers import StableDiffusionPipeline

    from lora_compress import expand_file

    pictures = []
    for kind in ("none", "packed", "plain"):
        pipe = StableDiffusionPipeline.from_pretrained(str(TINY_SD), safety_checker=None, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if kind == "packed":
            attention = {name: u for name, u in linear_updates(pipe, every=1, magnitude=0.2).items() if "attn" in name}
            packed = write(tmp_path / "lora.safetensors", attention, **settings)
            expand_file(packed, tmp_path / "expanded.safetensors", save_dtype=torch.float32)
            one_rule = ["diffusers-0.32"]
            compress_file(
                tmp_path / "expanded.safetensors",
                tmp_path / "plain.safetensors",
                CompressionSettings.parse({"allow_larger": True}),
                save_dtype=torch.float32,
                consumers=one_rule,
            )
            load_lora(pipe, packed)
        elif kind == "plain":
            pipe.load_lora_weights(str(tmp_path), weight_name="plain.safetensors")
        pipe.scheduler.set_timesteps(4)
        drawn = pipe(
            "a red star",
            num_inference_steps=4,
            guidance_scale=3.0,
            height=64,
            width=64,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        )
        pictures.append(torch.from_numpy(drawn.images[0]) * 255)
    none, ours, theirs = pictures
    assert (ours - none).abs().mean() > 1
    assert (ours - theirs).abs().max() < 1


def test_what_does_not_fit_is_refused_before_anything_is_attached(sd: Any, tmp_path: Path) -> None:
    updates = varied(sd)
    name, update = next(iter(updates.items()))
    strange = write(tmp_path / "strange.safetensors", updates | {"lora_unet_nowhere": random_update()})
    with pytest.raises(
        FormatError, match=r"1 of \d+ modules have no layer in this StableDiffusionPipeline, such as lora_unet_nowhere"
    ):
        load_lora(sd, strange)
    wide = LowRankUpdate(update.down, torch.cat([update.up, update.up]), update.alpha)
    with pytest.raises(FormatError, match="the layer of this StableDiffusionPipeline"):
        load_lora(sd, write(tmp_path / "wide.safetensors", {name: wide}))
    tensors = as_kohya(updates) | {f"{name}.dora_scale": torch.ones(4, 1)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "dora.safetensors")
    with pytest.raises(FormatError, match="dora_scale cannot be applied here"):
        load_lora(sd, tmp_path / "dora.safetensors")
    assert not dict(attached(sd.unet, "")) and not dict(attached(sd.text_encoder, ""))


def test_sgm_names_are_those_that_diffusers_itself_maps_to() -> None:
    """Against its converter for the same files, over all attention layers of SDXL."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    class Config:
        layers_per_block = 2

    depths = {"input_blocks_4_1": 2, "input_blocks_8_1": 10, "middle_block_1": 10, "output_blocks_2_1": 10, "output_blocks_5_1": 2}
    names = [f"lora_unet_{block}_{end}" for block in depths for end in ("proj_in", "proj_out")]
    names += [
        f"lora_unet_{block}_transformer_blocks_{depth}_{layer}"
        for block, count in depths.items()
        for depth in range(count)
        for layer in ("attn1_to_q", "attn2_to_v", "attn2_to_out_0", "ff_net_0_proj", "ff_net_2")
    ]
    for name in names:
        tensors = {f"{name}.lora_down.weight": torch.zeros(1, 1), f"{name}.lora_up.weight": torch.zeros(1, 1)}
        mapped = _maybe_map_sgm_blocks_to_diffusers(tensors, Config())
        (key,) = [key.removesuffix(".lora_down.weight") for key in mapped if "lora_down" in key]
        for theirs, ours in (("input_blocks", "down_blocks"), ("output_blocks", "up_blocks"), ("middle_block", "mid_block")):
            key = key.replace(theirs, ours)  # the second step of its converter
        assert sgm_name(name) == key


def flux_updates(width: int, blocks: int) -> dict[str, LowRankUpdate]:
    """Every layer of FLUX blocks that sd-scripts trains."""
    double = {"attn_qkv": (1, 3), "attn_proj": (1, 1), "mlp_0": (1, 4), "mlp_2": (4, 1), "mod_lin": (1, 6)}
    single = {"linear1": (1, 7), "linear2": (5, 1), "modulation_lin": (1, 3)}
    names = {f"double_blocks_{b}_{side}_{k}": s for b in range(blocks) for side in ("img", "txt") for k, s in double.items()}
    names |= {f"single_blocks_{b}_{k}": s for b in range(blocks) for k, s in single.items()}
    return {
        f"lora_unet_{name}": random_update(2 + i % 5, inputs * width, outputs * width, (), 0.5 + i % 3, i, 0.1)
        for i, (name, (inputs, outputs)) in enumerate(names.items())
    }


def test_fused_layers_of_flux_go_where_diffusers_itself_puts_them() -> None:
    """Against its converter for files of sd-scripts, which knows the full width alone."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    updates = flux_updates(3072, 1)
    found, missing = find_layers(updates, {f"transformer.{name}": layer.out_features for name, layer in linear.items()})
    theirs = _convert_kohya_flux_lora_to_diffusers(as_kohya(updates))
    assert not missing and found.keys() == {key.rpartition(".lora_")[0] for key in theirs}
    for name, update in found.items():
        x = torch.randn(update.down.shape[1], generator=torch.Generator().manual_seed(1))
        expected = theirs[f"{name}.lora_B.weight"] @ (theirs[f"{name}.lora_A.weight"] @ x)
        torch.testing.assert_close(update.scale * update.up @ (update.down @ x), expected, rtol=1e-3, atol=1e-4)


def test_a_flux_pipeline_gets_every_row_of_the_fused_layers(tmp_path: Path) -> None:
    pipe, updates = flux(), flux_updates(64, 2)
    load_lora(pipe, write(tmp_path / "flux.safetensors", updates, bits=8))
    expected = read_lora(tmp_path / "flux-packed.safetensors").updates
    found = dict(attached(pipe.transformer, ""))
    fused = ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp")
    for block in range(2):
        rows = torch.cat([found[f"single_transformer_blocks_{block}_{layer}"] for layer in fused])
        torch.testing.assert_close(rows, dense(expected[f"lora_unet_single_blocks_{block}_linear1"]), rtol=1e-4, atol=1e-5)
    assert sum(u.numel() for u in found.values()) == sum(dense(u).numel() for u in expected.values())


def test_sdxl_files_with_sgm_names(tmp_path: Path) -> None:
    """Attention, both kinds of resampling and convolutions of a narrow U-Net of SDXL's topology."""
    pipe = sdxl()
    layers = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_7_0_in_layers_2": "down_blocks.2.resnets.0.conv1",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
        "output_blocks_4_1_transformer_blocks_0_ff_net_2": "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "out_2": "conv_out",
    }
    updates = {}
    for i, (name, layer) in enumerate(layers.items()):
        out, inputs, *kernel = pipe.unet.get_submodule(layer).weight.shape
        updates[f"lora_unet_{name}"] = random_update(1 + i % 4, inputs, out, tuple(kernel), 1.0 + i, i, 0.1)
    load_lora(pipe, write(tmp_path / "sgm.safetensors", updates))
    wanted = {layer.replace(".", "_"): updates[f"lora_unet_{name}"] for name, layer in layers.items()}
    assert_attached(dict(attached(pipe.unet, "")), wanted)


class Checkpoint(dict[str, Tensor]):
    """Weights of an SD3 transformer; those that are not of interest are zeros."""

    def pop(self, key: str, *_: Any) -> Tensor:
        return super().pop(key, torch.zeros(3))


def test_fused_layers_of_sd3_go_where_diffusers_itself_puts_them() -> None:
    """Against its converter for checkpoints: the rows of a LoRA go where the rows of the weight go."""
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        model = SD3Transformer2DModel(num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16)
    sizes = {f"transformer.{n}": m.out_features for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    x_block = {"attn.qkv": 48, "attn.proj": 16, "mlp.fc1": 64, "mlp.fc2": 16, "adaLN_modulation.1": 96}
    layers = {f"joint_blocks.{i}.x_block.{name}": rows for i in (0, 1) for name, rows in x_block.items()}
    layers |= {f"joint_blocks.{i}.context_block.attn.qkv": 48 for i in (0, 1)}
    layers |= {f"joint_blocks.0.context_block.{name}": x_block[name] for name in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    updates = {
        "lora_unet_" + name.replace(".", "_"): random_update(2, 2, rows, seed=i) for i, (name, rows) in enumerate(layers.items())
    }
    weights = {f"{name}.weight": updates["lora_unet_" + name.replace(".", "_")].up for name in layers}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(
        Checkpoint(weights, **{"context_embedder.weight": torch.zeros(16, 2)})
    )
    found, missing = find_layers(updates, sizes)
    assert not missing and len(found) == len(layers) + 2 * 4
    for name, update in found.items():
        assert torch.equal(update.up, converted[name.removeprefix("transformer.") + ".weight"])


def test_layers_are_told_by_the_shortest_ends_that_no_other_layer_has() -> None:
    names = {"proj_out", "blocks.0.attn.to_q", "blocks.1.attn.to_q", "blocks.0.attn.to_out.0", "blocks.0.ff.0"}
    others = {"", "blocks", "blocks.0", "blocks.0.attn", "blocks.1.ff.0", "blocks.1.proj_out", "blocks.0.attn.to_out.1"}
    pattern = _pattern(names, others)
    assert {name for name in names | others if re.fullmatch(pattern, name)} == names
    assert "blocks" not in pattern.replace(r"blocks\.0\.ff", "")
    assert re.fullmatch(_pattern({"a"}, {"b.a"}), "a") and not re.fullmatch(_pattern({"a"}, {"b.a"}), "b.a")
