"""Applies LoRA files with the loader of A1111, Forge, Forge Neo or reForge, in a process of its own: their packages have names of
ours.

    python webui_worker.py a1111|forge|forge_neo|reforge HOST EXTENSION LORA... OUT|refuse

The model is a handful of layers under names of SD 1.5, SDXL and, but for A1111, which has no such model, FLUX. The files of the
loader are the host's own; what they import of the web page, settings and model management is stood in for. Writes the weights
afterwards, as {number of the LoRA}.{kohya's name}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

STRENGTHS = {1: -0.7, 2: 0.0}  # of the second and third LoRA, the first and the others have 1
UNET = {  # by kohya's name
    "lora_unet_down_blocks_0_attentions_0_proj_in": "input_blocks.1.1.proj_in",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": "middle_block.1.transformer_blocks.0.attn2.to_k",
    "lora_unet_up_blocks_1_resnets_0_conv1": "output_blocks.3.0.in_layers.2",
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": "input_blocks.4.1.transformer_blocks.1.attn1.to_q",  # SDXL
    "lora_unet_double_blocks_3_img_attn_proj": "double_blocks.3.img_attn.proj",  # FLUX
}
TEXT = {"lora_te_text_model_encoder_layers_0_mlp_fc1": "transformer.text_model.encoder.layers.0.mlp.fc1"}


def layers(host: str) -> dict[str, nn.Module]:
    """A layer for each name that the host may have."""
    torch.manual_seed(0)
    made = [
        nn.Conv2d(24, 16, 1),
        nn.Linear(20, 28),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.Linear(24, 24),
        nn.Linear(12, 36),
        nn.Linear(16, 40),
    ]
    named = {name: layer.requires_grad_(False) for name, layer in zip((*UNET, *TEXT), made, strict=True)}
    return {name: layer for name, layer in named.items() if host != "a1111" or "double_blocks" not in name}


def stand_in(name: str, **values: Any) -> None:
    """A module of the host that its loader imports and that would bring the whole program with it."""
    module = sys.modules[name] = ModuleType(name)
    module.__dict__.update(values)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def fail(error: Exception, *_: Any, **__: Any) -> None:
    """What the host shows on its page."""
    raise error


def no_files(files: list[str]) -> dict[str, Any]:
    """Settings with empty folders of LoRA: the loader lists them as it is imported."""
    folder = str(Path(files[0]).parent / "none")
    options = SimpleNamespace(lora_dir=folder, lora_dirs=[], lyco_dir_backcompat=folder)
    return {"cmd_opts": options, "walk_files": lambda *_, **__: []}


def register(extension: str) -> None:
    """As the host loads a script of an extension."""
    sys.path.insert(0, extension)
    script = Path(extension) / "scripts" / "packed_lora.py"
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), {"__name__": "packed_lora.py"})


def run_a1111(root: Path, extension: str, files: list[str]) -> dict[str, torch.Tensor]:
    """Load and apply each file alone, by the Lora extension's load_networks."""
    made = layers("a1111")
    stand_in("gradio")
    stand_in("modules", __path__=[str(root / "modules")])
    embeddings = SimpleNamespace(word_embeddings={}, expected_shape=-1)
    hijack = SimpleNamespace(embedding_db=embeddings, comments=[])
    settings = SimpleNamespace(lora_in_memory_limit=0)
    stand_in("modules.shared", sd_model=SimpleNamespace(is_sdxl=False), opts=settings, **no_files(files))
    stand_in("modules.devices", cpu=torch.device("cpu"), device=torch.device("cpu"), dtype=torch.float32, torch_gc=lambda: None)
    stand_in("modules.sd_models", read_state_dict=load_file)
    stand_in("modules.errors", display=fail)
    stand_in("modules.sd_hijack", model_hijack=hijack)
    for name in ("scripts", "cache", "hashes", "textual_inversion", "textual_inversion.textual_inversion"):
        stand_in(f"modules.{name}")
    sys.path.insert(0, str(root / "extensions-builtin" / "Lora"))
    networks: Any = __import__("networks")
    mapping = {}
    for name, layer in made.items():
        converted = networks.convert_diffusers_name_to_compvis(name, False)
        layer.network_layer_name = converted.replace("lora_unet_", "diffusion_model_")  # as names of SDXL are those of its layers
        mapping[layer.network_layer_name] = layer
    sys.modules["modules.shared"].sd_model.network_layer_mapping = mapping
    register(extension)
    register(extension)  # a second copy changes nothing
    found = {}
    for number, file in enumerate(files):
        disk = SimpleNamespace(filename=file, read_hash=lambda: None)
        networks.available_networks[file] = networks.available_network_aliases[file] = disk
        strength = STRENGTHS.get(number, 1.0)
        networks.load_networks([file], [strength], [strength], [None])
        for name, layer in made.items():
            networks.network_apply_weights(layer)
            found[f"{number}.{name}"] = layer.weight.detach().clone()
    return found


class Forge:
    """The LoRA extension and the ModelPatcher of Forge or Forge Neo, with a handful of layers as the loaded model."""

    def __init__(self, host: str, root: Path, extension: str, files: list[str]) -> None:
        self.made = layers(host)
        stand_in("modules", __path__=[str(root / "modules")])
        options = SimpleNamespace(sd_lora="None", lora_add_hashes_to_infotext=False)
        stand_in("modules.shared", opts=options, **no_files(files))
        for name in ("sd_models", "scripts"):
            stand_in(f"modules.{name}")
        network = lambda name, disk: SimpleNamespace(name=name, network_on_disk=disk)  # noqa: E731
        stand_in("network", Network=network, NetworkOnDisk=SimpleNamespace)
        sys.path[:0] = [str(root), str(root / "extensions-builtin" / "sd_forge_lora")]
        sys.argv[1:] = ["--always-cpu" if host == "forge" else "--cpu"]
        self.networks: Any = __import__("networks")
        from backend.patcher.base import ModelPatcher

        register(extension)
        register(extension)
        self.keys = keys = {name: f"diffusion_model.{key}" for name, key in UNET.items()} | TEXT
        models = [holder({keys[name]: self.made[name] for name in names}) for names in (UNET, TEXT)]
        cpu = torch.device("cpu")
        self.unet, text = (ModelPatcher(model, load_device=cpu, offload_device=cpu) for model in models)
        self.clip = Clip(text)
        models[0].storage_dtype = torch.float32  # type: ignore[assignment]
        # These two know whole models alone.
        self.networks.model_lora_keys_unet = lambda model: {name: f"{keys[name]}.weight" for name in UNET}
        self.networks.model_lora_keys_clip = lambda model: {name: f"{keys[name]}.weight" for name in TEXT}

    def apply(self, file: str, strength: float) -> list[tuple[Any, dict[str, str]]]:
        """Two patchers with a LoRA, each with the layers that are its own."""
        tensors = self.networks.load_lora_state_dict(file)
        unet, clip = self.networks.load_lora_for_models(self.unet, self.clip, tensors, strength, strength, filename=file)
        return [(unet, UNET), (clip.patcher, TEXT)]

    def prompt(self, file: str) -> None:
        """What a page does with <lora:file:1>."""
        from modules import extra_networks, sd_models

        if "lora" not in extra_networks.extra_network_registry:
            objects = SimpleNamespace(unet=self.unet, clip=self.clip, shallow_copy=lambda: None)
            model = SimpleNamespace(
                forge_objects=SimpleNamespace(**vars(objects)), forge_objects_original=objects, current_lora_hash=""
            )
            sd_models.model_data = SimpleNamespace(get_sd_model=lambda: model)
            extra_networks.register_extra_network(__import__("extra_networks_lora").ExtraNetworkLora())
        disk = SimpleNamespace(filename=file, read_hash=lambda: None, alias="", shorthash="")
        self.networks.available_networks[file] = self.networks.available_network_aliases[file] = disk
        parameters = {"lora": [extra_networks.ExtraNetworkParams([file, "1"])]}
        extra_networks.activate(SimpleNamespace(scripts=None, all_prompts=[]), parameters)


def run_forge(root: Path, extension: str, files: list[str]) -> dict[str, torch.Tensor]:
    """Load and apply each file alone, by its LoRA extension's load_lora_for_models and its LoraLoader."""
    host = Forge("forge", root, extension, files)
    found = {}
    for number, file in enumerate(files):
        for patcher, names in host.apply(file, STRENGTHS.get(number, 1.0)):
            patcher.lora_loader.refresh(patcher.lora_patches, force_refresh=True)
            for name in names:
                weight = patcher.model.get_parameter(f"{host.keys[name]}.weight")
                found[f"{number}.{name}"] = weight.detach().clone()
    return found


def run_forge_neo(root: Path, extension: str, files: list[str]) -> dict[str, torch.Tensor]:
    """Load and apply each file alone, by its LoRA extension's load_lora_for_models and its ModelPatcher."""
    host = Forge("forge_neo", root, extension, files)
    found = {}
    for number, file in enumerate(files):
        for patcher, names in host.apply(file, STRENGTHS.get(number, 1.0)):
            for name in names:
                key = f"{host.keys[name]}.weight"
                patcher.patch_weight_to_device(key)
                found[f"{number}.{name}"] = patcher.model.get_parameter(key).detach().clone()
            patcher.unpatch_model()
    return found


def refuse(host: str, root: Path, extension: str, files: list[str]) -> None:
    """Name the first file in a prompt, then each of the others twice: these must stop the page. Prints their messages."""
    page = Forge(host, root, extension, files)
    good, *others = files
    page.prompt(good)
    for file in (*others, *others):
        try:
            page.prompt(file)
        except RuntimeError as error:
            print(f"REFUSED {error}")
        page.prompt(good)


def run_reforge(root: Path, extension: str, files: list[str]) -> dict[str, torch.Tensor]:
    """Load and apply each file alone, by what its load_lora_for_models and its ModelPatcher call."""
    made = layers("reforge")
    sys.path.insert(0, str(root))
    from ldm_patched.modules import args_parser

    args_parser.args.always_cpu = True
    stand_in("ldm_patched.modules.model_base")  # every model it knows
    from ldm_patched.modules import lora, lora_convert, utils

    register(extension)
    register(extension)
    keys = {name: f"diffusion_model.{key}.weight" for name, key in UNET.items()} | {
        name: f"clip_l.{key}.weight" for name, key in TEXT.items()
    }
    found = {}
    for number, file in enumerate(files):
        tensors = lora_convert.convert_lora(utils.load_torch_file(file, safe_load=True))
        patches = lora.load_lora(tensors, keys)
        for name, layer in made.items():
            queue = [(STRENGTHS.get(number, 1.0), patches[keys[name]], 1.0, None, None)]
            found[f"{number}.{name}"] = lora.calculate_weight(queue, layer.weight.detach().clone(), keys[name])
    return found


class Clip:
    """What the loader asks of the host's text encoder."""

    def __init__(self, patcher: Any) -> None:
        self.patcher, self.cond_stage_model = patcher, patcher.model

    def clone(self) -> Clip:
        return Clip(self.patcher.clone())

    def add_patches(self, **arguments: Any) -> Any:
        return self.patcher.add_patches(**arguments)


def holder(layers: dict[str, nn.Module]) -> nn.Module:
    """A module that has the layers under their full names."""
    root = nn.Module()
    for name, layer in layers.items():
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(last, layer)
    return root


if __name__ == "__main__":
    host, root, extension, *files, out = sys.argv[1:]
    if out == "refuse":
        refuse(host, Path(root), extension, files)
        sys.exit()
    run = {"a1111": run_a1111, "forge": run_forge, "forge_neo": run_forge_neo, "reforge": run_reforge}[host]
    save_file(run(Path(root), extension, files), out)
