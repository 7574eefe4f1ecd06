"""The layers that numbers of cloneofsimo/lora stand for, against the modules of diffusers and transformers themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from library.compress_torchvision import declare_missing_operators
from lora_compress import open_lora

declare_missing_operators()
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def numbered(model: nn.Module, classes: set[str]) -> list[tuple[str, nn.Linear]]:
    """Linear layers inside of modules of these classes, in the order of model.modules(), as the trainer counted them."""
    found = []
    for prefix, ancestor in model.named_modules():
        if type(ancestor).__name__ in classes:
            for name, layer in ancestor.named_modules():
                if isinstance(layer, nn.Linear):
                    found.append((f"{prefix}.{name}", layer))
    return found


def unet(text: int) -> nn.Module:
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(cross_attention_dim=text)  # the other defaults are those of Stable Diffusion 1


def clip(width: int, layers: int) -> nn.Module:
    config = transformers.CLIPTextConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64)
    with torch.device("meta"):
        return transformers.CLIPTextModel(config)


@pytest.mark.parametrize("text", [768, 1024])
@pytest.mark.parametrize("classes", [{"Attention"}, {"Attention", "GEGLU"}], ids=["attention", "with GEGLU"])
def test_numbers_of_the_unet(text: int, classes: set[str], tmp_path: Path) -> None:
    check(numbered(unet(text), classes), "lora_unet_", tmp_path)


@pytest.mark.parametrize(("width", "layers"), [(768, 12), (1024, 23)])
def test_numbers_of_the_text_encoder(width: int, layers: int, tmp_path: Path) -> None:
    check(numbered(clip(width, layers), {"CLIPAttention"}), "lora_te_", tmp_path)


def check(layers: list[tuple[str, nn.Linear]], prefix: str, folder: Path) -> None:
    tensors = []
    for _, layer in layers:
        tensors += [torch.zeros(layer.out_features, 1), torch.zeros(1, layer.in_features)]
    torch.save(tensors, folder / "lora.pt")
    with open_lora(folder / "lora.pt") as source:
        names = {int(source.plain_keys(name).down.split(":")[1]): name for name in source}
    assert [names[number] for number in range(len(layers))] == [prefix + name.replace(".", "_") for name, _ in layers]
