"""The plug-in in ComfyUI itself: a packed file does to a model what the expanded file does, through the host's own loader."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from consumers.test_matrix import FORMATS
from core.factories import dense, random_update
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_compress import CompressionSettings, as_kohya, compress_file, expand_file, load_lora

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "num_heads": 4,
    "context_dim": 24,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
    "legacy": False,
}
CODECS: dict[str, dict[str, object]] = {
    "int4": {"bits": 4},
    "nf4": {"bits": 4, "strategy": "nf4"},
    "mixed": {"bits": 4, "strategy": "mixed"},
    "entropy": {"bits": 5, "strategy": "entropy", "progressive": True},
    "channels": {"bits": 8, "channel_threshold": 0.5},
}
DORA = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.fixture(scope="module")
def host(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """ComfyUI with the built plug-in loaded as it loads custom nodes, a folder of LoRA, and a small SD1.5 U-Net."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import folder_paths
    import nodes

    spec = importlib.util.spec_from_file_location("build", Path(__file__).parents[2] / "tools" / "build_integrations.py")
    assert spec is not None and spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    folder = builder.build("comfyui", tmp_path_factory.mktemp("custom_nodes"))
    assert asyncio.run(nodes.load_custom_node(str(folder)))
    loras = tmp_path_factory.mktemp("loras")
    folder_paths.add_model_folder_path("loras", str(loras))
    torch.manual_seed(0)
    model = comfy.supported_models.SD15(dict(UNET)).get_model({}, "", device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    cpu = torch.device("cpu")
    return SimpleNamespace(loras=loras, nodes=nodes, patcher=comfy.model_patcher.ModelPatcher(model, cpu, cpu))


def names_of(host: SimpleNamespace) -> dict[str, str]:
    """{kohya's name: key of the weight} as ComfyUI itself knows them."""
    import comfy.lora

    found = comfy.lora.model_lora_keys_unet(host.patcher.model, {})
    weights = host.patcher.model.state_dict()
    return {name: key for name, key in found.items() if name.startswith("lora_unet_") and key in weights}


def write_lora(host: SimpleNamespace, name: str, seed: int = 0, **settings: object) -> tuple[str, str]:
    """A LoRA over the whole U-Net with one DoRA module; its packed file and the expanded one, by name."""
    weights = host.patcher.model.state_dict()
    updates = {}
    for number, (module, key) in enumerate(names_of(host).items()):
        shape = weights[key].shape
        if len(shape) in (2, 4):
            rank = 2 + number % 5
            updates[module] = random_update(rank, shape[1], shape[0], tuple(shape[2:]), 1.0 + number % 3, seed + number, 0.05)
    dora = {f"{DORA}.dora_scale": torch.rand(len(updates[DORA].up), 1, 1, 1) + 0.5}
    tensors = {key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}
    save_file(tensors | dora, host.loras / f"{name}.safetensors")
    packed, plain = f"{name}-packed.safetensors", f"{name}-plain.safetensors"
    compress_file(host.loras / f"{name}.safetensors", host.loras / packed, CompressionSettings.parse(settings or {"bits": 4}))
    expand_file(host.loras / packed, host.loras / plain, save_dtype=torch.float32)
    return packed, plain


def load(host: SimpleNamespace, name: str, strength: float = 1.0, patcher: Any = None) -> Any:
    """With ComfyUI's own node."""
    return host.nodes.LoraLoader().load_lora(patcher or host.patcher, None, name, strength, strength)[0]


def patched(patcher: Any) -> dict[str, Tensor]:
    """The weights that ComfyUI computes with; the model is itself again afterwards."""
    patcher.patch_model(device_to=torch.device("cpu"))
    try:
        return {key: value.detach().clone() for key, value in patcher.model.state_dict().items()}
    finally:
        patcher.unpatch_model()


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], base: Mapping[str, Tensor], changed: int = 40) -> None:
    """To float32 rounding of the weights; and at least so many have changed."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert sum(not torch.equal(value, base[key]) for key, value in ours.items()) >= changed


@pytest.mark.parametrize("settings", CODECS.values(), ids=CODECS)
def test_the_stock_node_opens_packed_files(host: SimpleNamespace, settings: dict[str, object], caplog: Any) -> None:
    packed, plain = write_lora(host, "codec", **settings)
    base = patched(host.patcher.clone())
    assert_same(patched(load(host, packed)), patched(load(host, plain)), base)
    assert "not loaded" not in caplog.text.lower()


@pytest.mark.parametrize("strength", [-0.6, 0.0, 1.7])
def test_strengths(host: SimpleNamespace, strength: float) -> None:
    packed, plain = write_lora(host, "strength")
    ours, theirs = (host.nodes.LoraLoader().load_lora(host.patcher, None, name, strength, 1.0)[0] for name in (packed, plain))
    assert_same(patched(ours), patched(theirs), patched(host.patcher.clone()), changed=40 if strength else 0)


def test_lora_are_stacked(host: SimpleNamespace) -> None:
    first, second = write_lora(host, "first"), write_lora(host, "second", seed=100, bits=5, strategy="entropy")
    ours, theirs = (load(host, b, -0.4, load(host, a, 0.7)) for a, b in zip(first, second, strict=True))
    assert_same(patched(ours), patched(theirs), patched(host.patcher.clone()))


def test_codes_stay_small_in_memory_and_survive_the_transfer_to_a_device(host: SimpleNamespace) -> None:
    """What ComfyUI does where weights are streamed: it rebuilds every adapter from its weights, in the weight's own type."""
    from comfy.model_patcher import LowVramPatch

    packed, plain = write_lora(host, "streamed")
    ours, theirs = load(host, packed), load(host, plain)
    adapters = {key: ours.patches[key][0][1] for key in ours.patches}
    assert {adapter.name for adapter in adapters.values()} == {"lora_compress"}
    layers = [layer for adapter in adapters.values() for layer in adapter.weights[0].layers]
    held = {layer.untyped_storage().data_ptr(): layer.untyped_storage().nbytes() for layer in layers}
    assert sum(held.values()) < (host.loras / packed).stat().st_size
    for key in list(ours.patches)[::7]:
        weight = host.patcher.model.state_dict()[key].half()
        results = []
        for patcher in (ours, theirs):
            patch = LowVramPatch(key, patcher.patches)
            buffer = torch.empty(patch.memory_required() + 4096, dtype=torch.uint8)
            patch.prepare(buffer, None)
            results.append(patch(weight.clone()).float())
        torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


def test_bypass_computes_the_same(host: SimpleNamespace) -> None:
    import comfy.sd
    import comfy.utils

    packed, plain = write_lora(host, "bypass", bits=8)
    outputs = []
    for name in (packed, plain):
        tensors = {k: v for k, v in load_file(host.loras / name).items() if "dora_scale" not in k}
        patcher, _ = comfy.sd.load_bypass_lora_for_models(host.patcher, None, tensors, 0.8, 0.8)
        patcher.patch_model(device_to=torch.device("cpu"))
        patcher.inject_model()
        unet = patcher.model.diffusion_model
        generator = torch.Generator().manual_seed(3)
        x, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 7, 24, generator=generator)
        with torch.no_grad():
            outputs.append(unet(x, torch.tensor([10.0]), context=context))
        patcher.eject_model()
        patcher.unpatch_model()
    with torch.no_grad():
        outputs.append(unet(x, torch.tensor([10.0]), context=context))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert (outputs[0] - outputs[2]).norm() > 0.01 * outputs[2].norm()


def test_our_loader_takes_the_beginning_of_a_progressive_file(host: SimpleNamespace, tmp_path: Path) -> None:
    from lora_compress import truncate_file

    packed, plain = write_lora(host, "progressive", bits=6, strategy="entropy", progressive=True)
    whole = (host.loras / packed).stat().st_size
    node = host.nodes.NODE_CLASS_MAPPINGS["LoraCompressLoad"]()
    base, full = patched(host.patcher.clone()), patched(load(host, plain))
    assert_same(patched(node.load(host.patcher, packed, 1.0, 1.0)[0]), full, base)
    size = int(whole * 0.75)
    less = patched(node.load(host.patcher, packed, 1.0, 1.0, f"{size}")[0])
    changed = [key for key in full if not torch.allclose(less[key], full[key], rtol=1e-4, atol=1e-6)]
    assert changed
    truncate_file(host.loras / packed, host.loras / "cut.safetensors", size)
    cut = patched(load(host, "cut.safetensors"))
    distance, step = (sum(float((one[k] - two[k]).square().sum()) for k in full) for one, two in ((less, cut), (base, full)))
    assert distance < 0.02 * step  # the two cuts may differ by a chunk
    with pytest.raises(ValueError, match=r"progressive packed files"):
        node.load(host.patcher, plain, 1.0, 1.0, "1MB")


def test_files_are_compressed_and_told_about_in_the_graph(host: SimpleNamespace) -> None:
    write_lora(host, "node")
    nodes = host.nodes.NODE_CLASS_MAPPINGS
    done = nodes["LoraCompressCompress"]().compress("node.safetensors", "small.safetensors", "nf4", 4.0, 0.5, "", False)
    small, original = ((host.loras / name).stat().st_size for name in ("small.safetensors", "node.safetensors"))
    assert small < original / 4 and str(small) in done["result"][0]
    told = nodes["LoraCompressInfo"]().tell("small.safetensors")["result"][0]
    assert "kohya layout, sd1" in told and f"{small} bytes" in told
    base, ours = patched(host.patcher.clone()), patched(load(host, "small.safetensors"))
    assert any(not torch.equal(base[key], value) for key, value in ours.items())


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("SD15", UNET),
    "sdxl": (
        "SDXL",
        {**UNET, "transformer_depth": [0, 2], "transformer_depth_output": [2, 2, 0, 0], "use_linear_in_transformer": True}
        | {"model_channels": 64},  # its heads are of 64
    ),
    "flux": (
        "Flux",
        {"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 24, "context_in_dim": 24}
        | {"hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 14, 14]}
        | {"theta": 10000, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": []},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_gives_the_layers_what_the_file_holds(host: SimpleNamespace, family: str) -> None:
    """Plain formats as they are, packed ones through the plug-in; kohya's names of the family are those that ComfyUI knows."""
    import comfy.lora
    import comfy.model_patcher
    import comfy.supported_models

    kind, config = FAMILIES[family]
    model = getattr(comfy.supported_models, kind)(dict(config)).get_model({}, "", device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    base = patched(patcher.clone())
    found = comfy.lora.model_lora_keys_unet(model, {})
    once = {key: name for name, key in found.items() if name.startswith("lora_unet_") and isinstance(key, str) and key in base}
    keys = {name: key for key, name in once.items() if base[key].ndim in (2, 4)}
    updates = {
        name: random_update(
            2 + number % 5, base[key].shape[1], len(base[key]), tuple(base[key].shape[2:]), 1.0 + number % 3, number, 0.05
        )
        for number, (name, key) in enumerate(list(keys.items())[::3])
    }
    source = host.loras / f"{family}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, source)
    for form, settings in FORMATS.items():
        target = host.loras / f"{family}-{form}.safetensors"
        compress_file(
            source,
            target,
            CompressionSettings.parse({**settings, "allow_larger": True}),
            save_dtype=torch.float32,
            consumers=("comfyui",),
        )
        ours = patched(load(host, target.name, patcher=patcher))
        held = load_lora(target).updates
        assert held.keys() <= keys.keys() and len(held) > 5
        changed = {keys[name]: dense(update) for name, update in held.items()}
        for key, weight in ours.items():
            wanted = base[key] + changed[key].float().reshape(weight.shape) if key in changed else base[key]
            torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, at=(form, key): f"{at}: {text}")
