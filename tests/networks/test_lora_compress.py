"""The network module on narrow instances of sd-scripts' real U-Nets: the host's contract, compressed saving, loading."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import narrow_unet
from safetensors.torch import load_file

from lora_compress import CompressionSettings, SaveError, SettingsError, load_lora

HOST_ARGUMENTS = [
    {},
    {"conv_dim": "4", "conv_alpha": "2"},
    {"rank_dropout": "0.1", "module_dropout": "0.1", "loraplus_lr_ratio": "4"},
    {"block_dims": ",".join(["2"] * 12 + ["4"] + ["6"] * 12), "block_alphas": ",".join(["1"] * 25)},
    {"down_lr_weight": "sine", "mid_lr_weight": "0.5", "up_lr_weight": "cosine"},
]


@pytest.fixture
def ours(sd_scripts: Path) -> ModuleType:
    return importlib.import_module("networks.lora_compress")


@pytest.fixture
def theirs(sd_scripts: Path) -> ModuleType:
    return importlib.import_module("networks.lora")


@pytest.fixture
def unet(sd_scripts: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """sd-scripts' SD1.x U-Net, 32 to 64 channels wide."""
    return narrow_unet(monkeypatch)


@pytest.fixture
def text_encoder(sd_scripts: Path) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPTextModel(CLIPTextConfig(vocab_size=100, bos_token_id=98, eos_token_id=99, pad_token_id=99, **sizes))


def create(module: ModuleType, text_encoder: Any, unet: Any, dim: int = 8, alpha: float = 4, **network_args: Any) -> Any:
    torch.manual_seed(2)
    return module.create_network(1.0, dim, alpha, None, text_encoder, unet, neuron_dropout=None, dropout=None, **network_args)


def trained(module: ModuleType, text_encoder: Any, unet: Any, **network_args: Any) -> Any:
    """A network with falling spectra and nothing at zero, applied."""
    network = create(module, text_encoder, unet, **network_args)
    network.apply_to(text_encoder, unet)
    torch.manual_seed(3)
    for lora in network.text_encoder_loras + network.unet_loras:
        decay = 0.5 ** torch.arange(lora.lora_dim)
        lora.lora_up.weight.data = (
            torch.randn_like(lora.lora_up.weight) * 0.05 * decay.view(1, -1, *[1] * (lora.lora_up.weight.ndim - 2))
        )
    return network


def predict(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        return unet(noisy, torch.tensor([500]), text).sample


@pytest.mark.parametrize("network_args", HOST_ARGUMENTS)
def test_same_modules_weights_and_parameter_groups_as_the_host(
    ours: ModuleType, theirs: ModuleType, unet: Any, text_encoder: Any, network_args: dict[str, str]
) -> None:
    reference = create(theirs, text_encoder, unet, **network_args)
    network = create(ours, text_encoder, unet, rank_ratio="0.5", bits="4", **network_args)
    assert isinstance(network, theirs.LoRANetwork)
    pairs = zip(reference.text_encoder_loras + reference.unet_loras, network.text_encoder_loras + network.unet_loras, strict=True)
    for one, other in pairs:
        for attribute in ("lora_name", "lora_dim", "scale", "rank_dropout", "module_dropout"):
            assert getattr(one, attribute) == getattr(other, attribute)
        assert torch.equal(one.lora_down.weight, other.lora_down.weight)
    groups, descriptions = reference.prepare_optimizer_params(1e-4, 2e-4, 3e-4)
    ours_groups, ours_descriptions = network.prepare_optimizer_params(1e-4, 2e-4, 3e-4)
    assert ours_descriptions == descriptions
    assert [g["lr"] for g in ours_groups] == [g["lr"] for g in groups]
    assert [len(list(g["params"])) for g in ours_groups] == [len(list(g["params"])) for g in groups]


def test_max_norm_regularization_is_the_hosts(ours: ModuleType, theirs: ModuleType, unet: Any, text_encoder: Any) -> None:
    results = [trained(module, text_encoder, unet).apply_max_norm_regularization(0.05, "cpu") for module in (theirs, ours)]
    assert results[0] == results[1] and results[0][0] > 0


def test_host_arguments_are_those_the_host_reads(ours: ModuleType, theirs: ModuleType) -> None:
    found = ours.host_arguments(theirs)
    assert {name for arguments in HOST_ARGUMENTS for name in arguments} <= found
    assert not found & set(CompressionSettings().as_dict())


def test_unknown_and_contradictory_arguments_come_in_one_error(ours: ModuleType, unet: Any, text_encoder: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        create(ours, text_encoder, unet, rank_ration="0.5", bits="7", iterative_pruning="True", group_size="7")
    message = str(caught.value)
    for part in ("rank_ration", "did you mean rank_ratio", "bits=7", "nf4: 4", "iterative_pruning", "group_size=7"):
        assert part in message


def test_a_model_that_is_not_known_is_refused(ours: ModuleType, text_encoder: Any) -> None:
    with pytest.raises(Exception, match="found a Linear"):
        create(ours, text_encoder, torch.nn.Linear(2, 2))


def test_with_everything_off_the_file_is_the_hosts(
    ours: ModuleType, theirs: ModuleType, unet: Any, text_encoder: Any, tmp_path: Path
) -> None:
    network = trained(ours, text_encoder, unet)
    network.save_weights(str(tmp_path / "ours.safetensors"), torch.float16, {"ss_network_dim": "8"})
    theirs.LoRANetwork.save_weights(network, str(tmp_path / "theirs.safetensors"), torch.float16, {"ss_network_dim": "8"})
    ours_file, theirs_file = load_lora(tmp_path / "ours.safetensors"), load_lora(tmp_path / "theirs.safetensors")
    assert ours_file.metadata == theirs_file.metadata
    assert load_file(tmp_path / "ours.safetensors").keys() == load_file(tmp_path / "theirs.safetensors").keys()
    for key, tensor in load_file(tmp_path / "theirs.safetensors").items():
        assert torch.equal(load_file(tmp_path / "ours.safetensors")[key], tensor)


@pytest.mark.parametrize(
    "network_args",
    [
        {"bits": "8"},
        {"bits": "4", "rank_ratio": "0.6"},
        {"bits": "4", "strategy": "nf4", "group_size": "32"},
        {"bits": "4", "strategy": "static", "scale": "0.125"},
        {"rank_ratio": "0.5", "save_format": "kohya"},
        {"rank_ratio": "0.5", "save_format": "fp8"},
        {"bits": "8", "conv_dim": "4", "save_format": "both"},
    ],
    ids=lambda arguments: " ".join(arguments.values()),
)
def test_a_saved_network_draws_as_its_report_says(
    ours: ModuleType, unet: Any, text_encoder: Any, tmp_path: Path, network_args: dict[str, str]
) -> None:
    file = str(tmp_path / "lora.safetensors")
    untouched = predict(unet)
    network = trained(ours, text_encoder, unet, **network_args)
    full = predict(unet)
    network.save_weights(file, torch.float32, {"ss_network_dim": "8", "ss_network_alpha": "4"})
    network.set_multiplier(0.0)
    assert torch.equal(predict(unet), untouched)

    loaded, weights = ours.create_network_from_weights(1.0, file, None, text_encoder, unet, for_inference=True)
    loaded.apply_to(text_encoder, unet)
    info = loaded.load_state_dict(weights, False)
    assert not info.unexpected_keys
    drawn = predict(unet)
    lost = float((drawn - full).norm() / (full - untouched).norm())
    report = network.report
    assert 0.0 < report.total.relative_error < 0.6
    assert lost < 3 * report.total.relative_error  # the same order: the U-Net is no linear map of its weights
    assert load_lora(file).metadata["ss_compress_relative_error"] == f"{report.total.relative_error:.6e}"
    if network_args.get("save_format") == "both":  # the partner says the same, decoded
        partner = load_lora(tmp_path / "lora.kohya.safetensors").updates
        for name, update in load_lora(file).updates.items():
            assert torch.allclose(partner[name].dense(), update.dense(), atol=1e-6)


def test_packed_weights_merge_like_their_expansion(ours: ModuleType, unet: Any, text_encoder: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "lora.safetensors")
    network = trained(ours, text_encoder, unet, bits="4")
    network.save_weights(file, None, None)
    network.set_multiplier(0.0)
    loaded, weights = ours.create_network_from_weights(0.7, file, None, text_encoder, unet, for_inference=True)
    before = {lora.lora_name: lora.org_module.weight.detach().double() for lora in loaded.unet_loras}
    after = {lora.lora_name: lora.org_module for lora in loaded.unet_loras}
    loaded.merge_to(text_encoder, unet, weights, torch.float32, "cpu")
    for name, update in load_lora(file).updates.items():
        if name in before:
            expected = before[name] + 0.7 * update.dense().reshape(before[name].shape)
            assert torch.allclose(after[name].weight.double(), expected, atol=1e-5)


@pytest.mark.parametrize(("dim", "alpha"), [(8, 4), (8, 8), (16, 1)])
def test_loading_keeps_the_update_whatever_the_rank_and_alpha(
    ours: ModuleType, unet: Any, text_encoder: Any, tmp_path: Path, dim: int, alpha: float
) -> None:
    file = str(tmp_path / "lora.safetensors")
    trained(ours, text_encoder, unet, bits="8", rank_ratio="0.7").save_weights(file, None, None)
    other = create(ours, text_encoder, unet, dim, alpha)
    other.apply_to(text_encoder, unet)
    info = other.load_weights(file)
    assert not info.unexpected_keys and not info.missing_keys
    updates = load_lora(file).updates
    for name, live in other.updates().items():
        assert torch.allclose(live.dense(), updates[name].dense(), atol=1e-6)
        assert live.down_matrix.abs().sum(dim=1).min() > 0  # components that the file does not fill can still learn


def test_loading_more_components_than_the_network_has_says_what_to_do(
    ours: ModuleType, unet: Any, text_encoder: Any, tmp_path: Path
) -> None:
    file = str(tmp_path / "lora.safetensors")
    trained(ours, text_encoder, unet, bits="8").save_weights(file, None, None)
    small = create(ours, text_encoder, unet, dim=2)
    small.apply_to(text_encoder, unet)
    with pytest.raises(SettingsError, match="dim_from_weights"):
        small.load_weights(file)


def test_the_kohya_partner_goes_with_its_packed_file(ours: ModuleType, unet: Any, text_encoder: Any, tmp_path: Path) -> None:
    network = trained(ours, text_encoder, unet, bits="8", save_format="both")
    for name in ("a", "b"):
        network.save_weights(str(tmp_path / f"{name}.safetensors"), torch.float16, None)
    (tmp_path / "a.safetensors").unlink()  # as the host does with save_last_n_epochs
    network.save_weights(str(tmp_path / "c.safetensors"), torch.float16, None)
    names = {"b.safetensors", "b.kohya.safetensors", "c.safetensors", "c.kohya.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_what_would_fail_at_the_first_save_fails_before_training(
    ours: ModuleType, unet: Any, text_encoder: Any, tmp_path: Path
) -> None:
    network = create(ours, text_encoder, unet, bits="4")
    args = argparse.Namespace(save_model_as="ckpt", save_precision=None, output_dir=str(tmp_path))
    with pytest.raises(SettingsError, match="save_model_as=ckpt"):
        network.prepare_network(args)
    (tmp_path / "file").write_text("not a folder")
    args = argparse.Namespace(save_model_as="safetensors", save_precision=None, output_dir=str(tmp_path / "file"))
    with pytest.raises(SaveError, match="output_dir="):
        network.prepare_network(args)


def test_sdxl_with_both_text_encoders(ours: ModuleType, text_encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("library.sdxl_original_unet")
    monkeypatch.setattr(module, "MODEL_CHANNELS", 64)
    monkeypatch.setattr(module, "TIME_EMBED_DIM", 256)
    torch.manual_seed(0)
    unet = module.SdxlUNet2DConditionModel()
    encoders = [text_encoder, text_encoder]
    network = trained(ours, encoders, unet, bits="4", rank_ratio="0.5", strategy="nf4")
    noisy, context, vector = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 2048), torch.randn(1, 2816)
    with torch.no_grad():
        full = unet(noisy, torch.tensor([500]), context, vector)
        file = str(tmp_path / "lora.safetensors")
        network.save_weights(file, None, {"ss_network_dim": "8"})
        network.set_multiplier(0.0)
        untouched = unet(noisy, torch.tensor([500]), context, vector)
        loaded, _ = ours.create_network_from_weights(1.0, file, None, encoders, unet)
        loaded.apply_to(encoders, unet)
        loaded.load_weights(file)
        drawn = unet(noisy, torch.tensor([500]), context, vector)
    prefixes = {name.split("_")[1] for name in load_lora(file).updates}
    assert prefixes == {"unet", "te1", "te2"}
    assert load_lora(file).metadata["ss_network_dim"] == "Dynamic"
    assert float((drawn - full).norm() / (full - untouched).norm()) < 3 * network.report.total.relative_error
