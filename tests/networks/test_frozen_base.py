"""A packed base under the host's real networks: as many LoRA, the same step as on the decoded weights, on a U-Net and on a DiT."""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_compress.frozen import dequantized_weight, is_frozen, weight_bytes

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"))
DEFAULTS = {"base_quantize": None, "load_8bit_text_encoder": False, "gradient_checkpointing": False}


def unet_base() -> nn.Module:
    original_unet = importlib.import_module("library.original_unet")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BLOCK_OUT_CHANNELS": (32, 32, 64, 64), "TIMESTEP_INPUT_DIM": 32, "TIME_EMBED_DIM": 128}.items():
            patch.setattr(original_unet, name, value)
        return original_unet.UNet2DConditionModel(8, 8, 32)


def unet_predict(unet: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    return unet(noisy.to(dtype).requires_grad_(), torch.tensor([500]), text.to(dtype)).sample


def sdxl_base() -> nn.Module:
    sdxl_original_unet = importlib.import_module("library.sdxl_original_unet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdxl_original_unet, "MODEL_CHANNELS", 32)
        patch.setattr(sdxl_original_unet, "TIME_EMBED_DIM", 128)
        return sdxl_original_unet.SdxlUNet2DConditionModel()


def sdxl_predict(unet: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 2048, generator=generator)
    size = torch.randn(1, 2816, generator=generator)
    return unet(noisy.to(dtype).requires_grad_(), torch.tensor([500]), text.to(dtype), size.to(dtype))


def flux_base() -> nn.Module:
    flux_models = importlib.import_module("library.flux_models")
    sizes = {"in_channels": 64, "vec_in_dim": 32, "context_in_dim": 64, "hidden_size": 128, "num_heads": 4}
    more = {"depth": 2, "depth_single_blocks": 4, "axes_dim": [8, 12, 12], "theta": 10000, "mlp_ratio": 4.0}
    return flux_models.Flux(flux_models.FluxParams(**sizes, **more, qkv_bias=True, guidance_embed=True))


def flux_predict(flux: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    image, text, pooled = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1, 16, 64), (1, 5, 64), (1, 32)))
    positions = {"img_ids": torch.zeros(1, 16, 3), "txt_ids": torch.zeros(1, 5, 3)}
    strength = torch.full((1,), 3.5).to(dtype)
    return flux(
        img=image.requires_grad_(), txt=text, timesteps=torch.tensor([0.5]).to(dtype), y=pooled, guidance=strength, **positions
    )


BASES: dict[str, tuple[str, str, str, Callable[[], nn.Module], Callable[[nn.Module, torch.dtype], torch.Tensor]]] = {
    "unet": ("train_network", "NetworkTrainer", "networks.lora", unet_base, unet_predict),
    "flux": ("flux_train_network", "FluxNetworkTrainer", "networks.lora_flux", flux_base, flux_predict),
}
SDXL = ("sdxl_train_network", "SdxlNetworkTrainer", "networks.lora", sdxl_base, sdxl_predict)


@pytest.fixture
def base(request: pytest.FixtureRequest, sd_scripts: Path) -> Any:
    """A narrow model of the host's class with random weights, its trainer with our mixin, its network module."""
    script, trainer, network, build, predict = BASES.get(request.param, SDXL)
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the host leaves some of them at zero
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    mixin = importlib.import_module("library.compress_base").BaseModelMixin
    cls = type(trainer, (mixin, getattr(importlib.import_module(script), trainer)), {})
    module = importlib.import_module(network)
    return SimpleNamespace(model=model.requires_grad_(False), trainer=cls(), module=module, predict=predict)


def text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPTextModel(CLIPTextConfig(vocab_size=100, bos_token_id=98, eos_token_id=99, pad_token_id=99, **sizes))


def network_over(base: Any, model: nn.Module, encoder: Any = None, **options: Any) -> Any:
    """The host's network, made and applied in the order in which the host's trainer does it."""
    torch.manual_seed(2)
    network = base.module.create_network(1.0, 4, 4, None, [] if encoder is None else [encoder], model)
    arguments = argparse.Namespace(**DEFAULTS | options, cache_text_encoder_outputs=False)
    base.trainer.post_process_network(arguments, ACCELERATOR, network, [] if encoder is None else [encoder], model)
    network.apply_to([] if encoder is None else [encoder], model, encoder is not None, True)
    generator = torch.Generator().manual_seed(3)
    for lora in network.text_encoder_loras + network.unet_loras:  # zero in a new network, and then the factor down gets no gradient
        lora.lora_up.weight.data = torch.randn(lora.lora_up.weight.shape, generator=generator) * 0.05
    return network


def decoded(model: nn.Module) -> nn.Module:
    """A float copy with the weights that the packed layers decode to; for a model without a network over it."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if is_frozen(module):
            weight = dequantized_weight(module)
            del module.forward, module.frozen_format
            module._buffers.clear()
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def pack(base: Any, name: str) -> None:
    arguments = argparse.Namespace(**DEFAULTS | {"base_quantize": name}, cache_text_encoder_outputs=False)
    base.trainer.post_process_network(arguments, ACCELERATOR, SimpleNamespace(train_t5xxl=False), [], base.model)


def step(
    base: Any, model: nn.Module, network: Any, autocast: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[float, list]:
    network.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = base.predict(model, dtype).float().square().mean()
    loss.backward()
    return loss.item(), [parameter.grad.float() for parameter in network.parameters()]


@pytest.mark.parametrize("name", ["int8", "nf4", "fp8"])
@pytest.mark.parametrize("base", BASES, indirect=True)
def test_a_step_is_that_on_the_decoded_base(base: Any, name: str) -> None:
    pack(base, name)
    copied = decoded(base.model)
    assert not any(is_frozen(module) for module in copied.modules())
    loss, gradients = step(base, base.model, network_over(base, base.model))
    expected_loss, expected = step(base, copied, network_over(base, copied))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert len(gradients) == len(expected) and any(gradient.any() for gradient in gradients)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()) + 1e-9)
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize(
    ("base", "name"), [("unet", "int8"), ("flux", "nf4"), ("flux", "fp8"), ("sdxl", "int8")], indirect=["base"]
)
def test_every_layer_still_gets_its_lora(base: Any, name: str) -> None:
    plain = copy.deepcopy(base.model)
    classes = [type(module) for module in plain.modules()]
    expected = [lora.lora_name for lora in network_over(base, plain).unet_loras]
    found = [lora.lora_name for lora in network_over(base, base.model, base_quantize=name).unet_loras]
    assert found == expected and len(found) > 20
    assert [type(module) for module in base.model.modules()] == classes
    layers = [module for module in base.model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert sum(map(is_frozen, layers)) > 0.8 * len(layers)


def test_text_encoders_are_packed_and_keep_their_lora(sd_scripts: Path) -> None:
    script, trainer, network, build, _ = BASES["unet"]
    mixin = importlib.import_module("library.compress_base").BaseModelMixin
    cls = type(trainer, (mixin, getattr(importlib.import_module(script), trainer)), {})
    base = SimpleNamespace(trainer=cls(), module=importlib.import_module(network))
    tokens = torch.arange(7).unsqueeze(0)
    names, outputs = [], []
    for packed in (False, True):
        encoder = text_encoder()
        made = network_over(base, build(), encoder, load_8bit_text_encoder=packed)
        names.append([lora.lora_name for lora in made.text_encoder_loras])
        assert sum(map(is_frozen, encoder.modules())) == (12 if packed else 0)
        outputs.append(encoder(tokens).last_hidden_state)
        outputs[-1].square().sum().backward()
        assert all(lora.lora_down.weight.grad.any() for lora in made.text_encoder_loras)
    assert names[0] == names[1] and len(names[0]) == 12
    assert float((outputs[1] - outputs[0]).detach().norm() / outputs[0].detach().norm()) < 0.02


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({"network_train_unet_only": True}, True),
        ({"network_train_unet_only": True, "base_weights": ["a.safetensors"]}, False),  # merged into it after this
        ({}, False),  # its network is made after this, and may look at the weights
    ],
    ids=["frozen", "merged into", "trained"],
)
@pytest.mark.parametrize("base", ["unet"], indirect=True)
def test_text_encoders_are_packed_before_they_go_to_the_gpu_where_they_can(
    base: Any, options: dict[str, Any], packed: bool
) -> None:
    encoder, tokens = text_encoder(), torch.arange(7).unsqueeze(0)
    with torch.no_grad():
        expected = encoder(tokens).last_hidden_state
        rest = {"network_train_unet_only": False, "base_weights": None, "load_8bit_text_encoder": True}
        arguments = argparse.Namespace(**DEFAULTS | rest | options)
        base.trainer.cache_text_encoder_outputs_if_needed(arguments, ACCELERATOR, None, None, [encoder], None, torch.float32)
        output = encoder(tokens).last_hidden_state
    assert any(map(is_frozen, encoder.modules())) == packed
    assert float((output - expected).norm() / expected.norm()) < 0.02
    network = base.module.create_network(1.0, 4, 4, None, [encoder], base.model)
    assert len(network.text_encoder_loras) == 12  # made for it even if it is not trained


@pytest.mark.parametrize("name", ["int8", "nf4"])
@pytest.mark.parametrize("base", BASES, indirect=True)
def test_full_bf16_and_autocast(base: Any, name: str) -> None:
    """--full_bf16 casts base and network after packing, --mixed_precision=bf16 computes in bf16: both stay close to float32."""
    network = network_over(base, base.model, base_quantize=name)
    exact, _ = step(base, base.model, network)
    packed = [dequantized_weight(module) for module in base.model.modules() if is_frozen(module)]
    for parameter in network.parameters():
        parameter.grad = None
    mixed, _ = step(base, base.model, network, autocast=True)
    base.model.to(dtype=torch.bfloat16)
    network.to(torch.bfloat16)
    full, gradients = step(base, base.model, network, autocast=True, dtype=torch.bfloat16)
    assert mixed == pytest.approx(exact, rel=0.1) and full == pytest.approx(exact, rel=0.1)
    assert all(gradient.isfinite().all() for gradient in gradients) and any(gradient.any() for gradient in gradients)
    after = [dequantized_weight(module) for module in base.model.modules() if is_frozen(module)]
    assert all(torch.equal(mine, before) for mine, before in zip(after, packed, strict=True))


@pytest.mark.parametrize("base", [*BASES, "sdxl"], indirect=True)
def test_gradient_checkpointing_changes_nothing_and_warns_of_nothing(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.utils.checkpoint

    if hasattr(module := sys.modules[type(base.model).__module__], "USE_REENTRANT"):
        monkeypatch.setattr(module, "USE_REENTRANT", True)  # and back again after the test
    reentrant: list[int] = []
    original = torch.utils.checkpoint.CheckpointFunction.apply
    monkeypatch.setattr(torch.utils.checkpoint.CheckpointFunction, "apply", lambda *args: reentrant.append(1) or original(*args))
    network = network_over(base, base.model, base_quantize="int8", gradient_checkpointing=True)
    loss, expected = step(base, base.model, network)
    for parameter in network.parameters():
        parameter.grad = None
    base.model.enable_gradient_checkpointing()
    base.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, gradients = step(base, base.model, network)
    assert again == pytest.approx(loss, rel=1e-6) and not reentrant
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_of_text_encoders(sd_scripts: Path) -> None:
    from library.compress_base import _checkpoint_without_reentrance

    encoder = text_encoder().train()
    expected = encoder(torch.arange(7).unsqueeze(0)).last_hidden_state
    _checkpoint_without_reentrance(nn.Module(), [encoder])
    encoder.gradient_checkpointing_enable()
    encoder.requires_grad_(False)
    encoder.text_model.embeddings.requires_grad_(True)  # the host's workaround for the other kind of checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = encoder(torch.arange(7).unsqueeze(0)).last_hidden_state
    names = set()
    pending = [output.grad_fn]
    while pending:
        node = pending.pop()
        names.add(type(node).__name__)
        pending += [following for following, _ in node.next_functions if following is not None]
    assert "CheckpointFunctionBackward" not in names and torch.equal(output, expected)


@pytest.mark.parametrize("name", ["int8", "nf4"])
@pytest.mark.parametrize("base", ["flux"], indirect=True)
def test_block_swapping_moves_codes_as_it_moves_weights(base: Any, name: str) -> None:
    """The host's own functions swap the codes of two blocks, prepare the devices of all, and leave every scale where it belongs.

    A whole step with blocks_to_swap needs a GPU: where both devices are the CPU, the host's swap gives both blocks the same memory.
    """
    offloading = importlib.import_module("library.custom_offloading_utils")
    pack(base, name)
    device, blocks = torch.device("cpu"), base.model.single_blocks
    first, last = ([module for module in blocks[index].modules() if is_frozen(module)] for index in (0, 3))
    scales = [module.weight_scale_1.clone() for module in first]
    codes = [module.weight.clone() for module in last]
    offloading.swap_weight_devices_no_cuda(device, blocks[0], blocks[3])  # block 3 comes in, into the memory of block 0
    assert all(torch.equal(module.weight, kept) for module, kept in zip(last, codes, strict=True))
    assert [module.weight.data_ptr() for module in last] == [module.weight.data_ptr() for module in first]
    assert all(torch.equal(module.weight_scale_1, kept) for module, kept in zip(first, scales, strict=True))
    before = [dequantized_weight(module) for module in base.model.modules() if is_frozen(module)]
    base.model.enable_block_swap(1, device)
    base.model.move_to_device_except_swap_blocks(device)
    base.model.prepare_block_swap_before_forward()
    after = [dequantized_weight(module) for module in base.model.modules() if is_frozen(module)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(after, before, strict=True))


FULL = {"unet": ("int8", 0.45), "unet in nf4": ("nf4", 0.55), "flux": ("nf4", 0.60), "flux in int8": ("int8", 0.45)}


@pytest.mark.parametrize("kind", FULL)
def test_bytes_of_full_size_models(sd_scripts: Path, kind: str) -> None:
    """Counted on the meta device: SD 1.5's U-Net and FLUX.1 as the host builds them, against fp16."""
    from library.compress_base import _pack

    name, share = FULL[kind]
    with torch.device("meta"):
        if kind.startswith("unet"):
            model = importlib.import_module("library.original_unet").UNet2DConditionModel(64, 8, 768)
        else:
            flux_models = importlib.import_module("library.flux_models")
            model = flux_models.Flux(flux_models.configs["dev"].params)
    before = weight_bytes(model.half())
    _pack(kind, model, name, torch.device("meta"))
    assert 1 - weight_bytes(model) / before > share
