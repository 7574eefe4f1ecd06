"""sd-scripts reads the same update from the same file, and from the plain file that comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core.layouts.files import assert_close, dense, random, save, written_back
from torch import Tensor, nn

from lora_compress.sources.open import open_lora

NAME = "lora_unet_m"


def merged(kind: str, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The weight that sd-scripts' merge adds to a layer of zeros."""
    from networks import loha, lokr

    module = {"loha": loha, "lokr": lokr}[kind]
    return module.merge_weights_to_tensor(torch.zeros(shape), NAME, tensors, set(tensors), 1.0, torch.device("cpu"))


def named(**parts: Tensor) -> dict[str, Tensor]:
    return {f"{NAME}.{key}": tensor for key, tensor in parts.items()}


LOHA = {f"hada_w{i}_{side}": random(*size, seed=i) for i in (1, 2) for side, size in (("a", (10, 3)), ("b", (3, 72)))}
CORES = {f"hada_w{i}_{side}": random(3, size, seed=i) for i in (1, 2) for side, size in (("a", 10), ("b", 8))}
CASES = {
    "LoHa": ("loha", named(**LOHA), (10, 72)),
    "LoHa alpha": ("loha", named(**LOHA, alpha=torch.tensor(2.0)), (10, 72)),
    "LoHa convolution": ("loha", named(**LOHA, alpha=torch.tensor(-1.0)), (10, 8, 3, 3)),
    "LoHa cores": ("loha", named(**CORES, hada_t1=random(3, 3, 3, 3), hada_t2=random(3, 3, 3, 3, seed=5)), (10, 8, 3, 3)),
    "LoKr": ("lokr", named(lokr_w1=random(2, 3), lokr_w2=random(5, 4), alpha=torch.tensor(1e10)), (10, 12)),
    "LoKr product": (
        "lokr",
        named(lokr_w1=random(2, 3), lokr_w2_a=random(5, 2), lokr_w2_b=random(2, 4), alpha=torch.tensor(3.0)),
        (10, 12),
    ),
    "LoKr convolution": ("lokr", named(lokr_w1=random(2, 3), lokr_w2_a=random(5, 2), lokr_w2_b=random(2, 36)), (10, 12, 3, 3)),
    "LoKr cores": (
        "lokr",
        named(
            lokr_w1=random(2, 3),
            lokr_w2_a=random(2, 5),
            lokr_w2_b=random(2, 4),
            lokr_t2=random(2, 2, 3, 3),
            alpha=torch.tensor(1.0),
        ),
        (10, 12, 3, 3),
    ),
}


@pytest.mark.parametrize(("kind", "tensors", "shape"), CASES.values(), ids=CASES.keys())
def test_what_sd_scripts_merges_is_what_is_read(
    kind: str, tensors: dict[str, Tensor], shape: tuple[int, ...], sd_scripts: Path, tmp_path: Path
) -> None:
    update = open_lora(save(tensors, tmp_path))[NAME]
    assert_close(dense(update), merged(kind, tensors, shape).double().flatten(1), 2e-6)


@pytest.mark.parametrize("alpha", [None, 0.0, 2.0, -2.0])
@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_a_lora_network_of_sd_scripts_merges_what_is_read(
    kernel: int | None, alpha: float | None, sd_scripts: Path, tmp_path: Path
) -> None:
    from networks.lora import LoRAInfModule

    layer = nn.Linear(6, 5, bias=False) if kernel is None else nn.Conv2d(6, 5, kernel, bias=False)
    layer.weight.data.zero_()
    module = LoRAInfModule(NAME, layer, 1.0, 4, torch.tensor(4.0 if alpha is None else alpha))
    module.lora_up.weight.data.copy_(random(*module.lora_up.weight.shape))
    tensors = {f"{NAME}.lora_{side}.weight": getattr(module, f"lora_{side}").weight.detach() for side in ("down", "up")}
    if alpha is not None:
        tensors[f"{NAME}.alpha"] = torch.tensor(alpha)
    source = open_lora(save(tensors, tmp_path))
    update = source[NAME]
    for written in (tensors, written_back(source, NAME, update)):
        module.scale = float(written.get(f"{NAME}.alpha", 0.0)) / 4 or 1.0
        layer.weight.data.zero_()
        module.merge_to({key.removeprefix(f"{NAME}."): t for key, t in written.items()}, torch.float32, "cpu")
        assert_close(dense(update), layer.weight.detach().double().flatten(1), 1e-6)


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_flux_files_of_ai_toolkit_convert_to_the_same_update(layout: str, sd_scripts: Path, tmp_path: Path) -> None:
    """sd-scripts' own converter, run on the plain file that comes back, gives the update that was read."""
    from networks import convert_flux_lora

    down, up = random(4, 16), random(48, 4)
    if layout == "kohya":
        name = "lora_unet_double_blocks_0_img_mlp_0"
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(4.0)}
        other, keys = convert_flux_lora.convert_sd_scripts_to_ai_toolkit, ("lora_A", "lora_B")
    else:
        name = "transformer.transformer_blocks.0.ff.net.0.proj"
        tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        other, keys = convert_flux_lora.convert_ai_toolkit_to_sd_scripts, ("lora_down", "lora_up")
    source = open_lora(save(tensors, tmp_path))
    update = source[name]
    converted = other(written_back(source, name, update))
    (a,) = (tensor for key, tensor in converted.items() if keys[0] in key)
    (b,) = (tensor for key, tensor in converted.items() if keys[1] in key)
    alpha = next((float(tensor) for key, tensor in converted.items() if key.endswith("alpha")), float(len(a)))
    assert_close(b.double() @ a.double() * (alpha / len(a)), dense(update), 1e-6)
