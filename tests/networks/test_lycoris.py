"""base=lycoris.kohya: LyCORIS networks on sd-scripts' real U-Net, saved compressed and read back."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import narrow_unet
from safetensors.torch import load_file

from lora_compress import SettingsError, load_lora

lycoris = pytest.importorskip("lycoris.kohya", reason="lycoris-lora is not installed", exc_type=ImportError)
_preset = ""


@pytest.fixture
def ours(sd_scripts: Path) -> ModuleType:
    return importlib.import_module("networks.lora_compress")


@pytest.fixture
def unet(sd_scripts: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    return narrow_unet(monkeypatch).requires_grad_(False).eval()


def predict(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    return unet(noisy, torch.tensor([500]), text).sample


@pytest.fixture(autouse=True)
def preset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The middle block alone: linear layers and convolutions, of 1x1 and of 3x3. Presets are state of LyCORIS's class."""
    global _preset
    file = tmp_path_factory.mktemp("preset") / "middle.toml"
    text_encoder = "text_encoder_target_module = []\ntext_encoder_target_name = []\n"
    file.write_text(f'enable_conv = true\nunet_target_module = []\nunet_target_name = ["mid_block.*"]\n{text_encoder}')
    before = {name: value for name, value in vars(lycoris.LycorisNetworkKohya).items() if name.isupper()}
    _preset = str(file)
    yield
    for name, value in before.items():
        setattr(lycoris.LycorisNetworkKohya, name, value)


def create(ours: ModuleType, unet: torch.nn.Module, **network_args: str) -> Any:
    torch.manual_seed(2)
    arguments = {"base": "lycoris.kohya", "preset": _preset, **network_args}
    return ours.create_network(1.0, 4, 2.0, None, torch.nn.Module(), unet, neuron_dropout=None, dropout=None, **arguments)


def trained(ours: ModuleType, unet: torch.nn.Module, **network_args: str) -> Any:
    """A network after one step through the U-Net, and some noise, so that its modules do not all work in one direction."""
    network = create(ours, unet, **network_args)
    network.apply_to(torch.nn.Module(), unet, False, True)
    parameters, _ = network.prepare_optimizer_params(1e-2, 1e-2, 1e-2)
    optimizer = torch.optim.AdamW([{**group, "params": list(group["params"])} for group in parameters], lr=1e-2)
    network.train()
    (predict(unet) + 1).square().mean().backward()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.step()
    assert any(not torch.equal(parameter, old) for parameter, old in zip(network.parameters(), before, strict=True))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return network.eval()


@torch.no_grad()
def changes(network: Any) -> torch.Tensor:
    """What a network adds to the outputs of all its layers for fixed inputs, in their real forward."""
    added = []
    for lora in sorted(network.unet_loras, key=lambda lora: lora.lora_name):
        layer, generator = lora.org_module[0], torch.Generator().manual_seed(5)
        if layer.weight.ndim == 1:  # a norm
            continue
        inputs = layer.weight.shape[1]
        shape = (1, 5, inputs) if isinstance(layer, torch.nn.Linear) else (1, inputs, 6, 6)
        x = torch.randn(shape, generator=generator)
        added.append((layer(x) - lora.org_forward(x)).flatten())
    return torch.cat(added)


def lost(reference: torch.Tensor, other: torch.Tensor, base: torch.Tensor) -> float:
    return float((other - reference).norm() / (reference - base).norm())


@pytest.mark.parametrize(
    "network_args",
    [
        {"algo": "locon", "conv_dim": "2", "conv_alpha": "1"},
        {"algo": "lora", "dora_wd": "True"},
        {"algo": "lora", "rs_lora": "True"},
        {"algo": "lora", "use_scalar": "True"},
        {"algo": "loha"},
        {"algo": "lokr", "factor": "4"},
    ],
    ids=lambda arguments: " ".join(arguments.values()),
)
def test_a_saved_network_draws_as_it_did(ours: ModuleType, unet: Any, tmp_path: Path, network_args: dict[str, str]) -> None:
    """Reloaded by us from the packed file and by LyCORIS itself from a plain one."""
    packed, plain, whole = (str(tmp_path / f"{name}.safetensors") for name in ("packed", "plain", "whole"))
    with torch.no_grad():
        base = predict(unet)
    network = trained(ours, unet, bits="8", **network_args)
    with torch.no_grad():
        full, whole_change = predict(unet), changes(network)
        network.save_weights(packed, torch.float16, {"ss_network_dim": "4"})
        error = network.report.total.relative_error
        network.compression = type(network.compression).parse({"rank_ratio": "0.9999"})
        network.save_weights(plain, torch.float32, {})
        network.compression = type(network.compression).parse({})
        network.save_weights(whole, torch.float32, {})
        network.set_multiplier(0.0)
        network.restore()
        assert torch.equal(predict(unet), base)
        assert load_lora(packed).packed and 0 < error < 0.05
        kept = load_file(whole)
        for key, tensor in load_lora(packed).others.items():  # dora_scale, to the bit
            assert torch.equal(tensor, kept[key])
        assert (network_args.get("dora_wd") is None) == (not any("dora_scale" in key for key in load_lora(packed).others))
        files = [(ours, packed, 2 * error), (lycoris, whole, 1e-5)]
        if network_args["algo"] in ("lora", "locon"):  # LyCORIS wants pairs of convolutions as such, converted ones are matrices
            files.append((lycoris, plain, 1e-4))
        for module, file, limit in files:
            arguments = {"base": "lycoris.kohya"} if module is ours else {}
            again, weights = module.create_network_from_weights(1.0, file, None, None, unet, **arguments)
            again.apply_to(None, unet, False, True)
            again.load_state_dict(weights, False)
            assert (changes(again) - whole_change).norm() < limit * whole_change.norm()
            assert lost(full, predict(unet), base) < 30 * limit  # the U-Net is no linear map of its weights
            again.restore()
    assert not list(tmp_path.glob(".lycoris*"))


def test_the_report_compares_with_lycoris_own_file(ours: ModuleType, unet: Any, tmp_path: Path) -> None:
    network = trained(ours, unet, bits="8", algo="lora")
    network.save_weights(str(tmp_path / "packed.safetensors"), torch.float16, {})
    lycoris.LycorisNetworkKohya.save_weights(network, str(tmp_path / "whole.safetensors"), torch.float16, {})
    before, after = network.report.bytes
    assert after == (tmp_path / "packed.safetensors").stat().st_size
    assert before == pytest.approx((tmp_path / "whole.safetensors").stat().st_size, rel=0.01)


def test_dora_goes_on_from_a_packed_file(ours: ModuleType, unet: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "lora.safetensors")
    with torch.no_grad():
        base = predict(unet)
    network = trained(ours, unet, bits="8", algo="lora", dora_wd="True")
    with torch.no_grad():
        network.save_weights(file, None, {})
        full = predict(unet)
        network.restore()
        again = create(ours, unet, algo="lora", dora_wd="True")
        again.apply_to(None, unet, False, True)
        assert not again.load_weights(file).unexpected_keys
        assert lost(full, predict(unet), base) < 0.1


@pytest.mark.parametrize("algo", ["diag-oft", "boft", "ia3", "glora"])
def test_what_is_no_update_is_refused_only_with_compression(ours: ModuleType, unet: Any, algo: str) -> None:
    with pytest.raises(SettingsError, match=r"cannot be compressed: choose algo=lora"):
        create(ours, unet, algo=algo, bits="8")
    assert create(ours, unet, algo=algo).report is None


def test_a_packed_file_does_not_go_into_a_loha(ours: ModuleType, unet: Any, tmp_path: Path) -> None:
    network = trained(ours, unet, bits="8", algo="loha")
    network.save_weights(str(tmp_path / "lora.safetensors"), None, {})
    with pytest.raises(SettingsError, match="converted to plain LoRA"):
        network.load_weights(str(tmp_path / "lora.safetensors"))


IN_TRAINING = {"iterative_pruning": "true", "max_iterations": "2", "rank_ratio": "0.5", "min_rank": "1", "pruning_end": "0.4"}
QAT = {"bits": "4", "group_size": "32", "qat": "true", "qat_start": "0.5"}


def compressed_while_training(ours: ModuleType, unet: torch.nn.Module, folder: Path, steps: int = 12, **network_args: str) -> Any:
    network = create(ours, unet, conv_dim="4", conv_alpha="2", **{**IN_TRAINING, **QAT, **network_args})
    network.prepare_network(
        SimpleNamespace(save_model_as="safetensors", save_precision="float", output_dir=folder, max_train_steps=12)
    )
    network.apply_to(torch.nn.Module(), unet, False, True)
    parameters, _ = network.prepare_optimizer_params(1e-2, 1e-2, 1e-2)
    optimizer = torch.optim.AdamW([{**group, "params": list(group["params"])} for group in parameters], lr=1e-2)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (predict(unet) + 1).square().mean().backward()
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize(
    "network_args",
    [
        {"algo": "locon"},
        {"algo": "lora", "dora_wd": "True"},
        {"algo": "locon", "bypass_mode": "True", "rs_lora": "True"},
        {"algo": "lora", "train_norm": "True", "use_tucker": "True"},
        {"algo": "locon", "strategy": "nf4", "group_size": "64"},
    ],
    ids=lambda arguments: " ".join(arguments.values()),
)
def test_pairs_are_pruned_and_quantized_while_they_train(
    ours: ModuleType, unet: Any, tmp_path: Path, network_args: dict[str, str]
) -> None:
    """The file computes what the network computed, dora_scale and norms included."""
    network = compressed_while_training(ours, unet, tmp_path, **network_args)
    session = network.session
    assert session.quantizing and 0.45 < float(session.state.kept.float().mean()) < 0.55  # min_rank keeps a few more
    with torch.no_grad():
        drawn, changed = predict(unet), changes(network)
        live = network.state_dict()
        for name, pair in session.pairs.items():  # what is trained goes into the state, what it computes with into the file
            assert torch.equal(live[f"{name}.lora_up.weight"], pair.weights[1])
        assert any(not torch.equal(session.effective_weight(name, 1), pair.weights[1]) for name, pair in session.pairs.items())
        file = str(tmp_path / "lora.safetensors")
        network.save_weights(file, torch.float32, {})
        network.restore()
        assert network.report.bytes[1] == (tmp_path / "lora.safetensors").stat().st_size
        again, weights = ours.create_network_from_weights(1.0, file, None, None, unet, base="lycoris.kohya")
        again.apply_to(None, unet, False, True)
        again.load_state_dict(weights, False)
        assert (changes(again) - changed).norm() < 1e-4 * changed.norm()
        assert torch.allclose(predict(unet), drawn, rtol=1e-3, atol=1e-5)
        again.restore()
    resumed = compressed_while_training(ours, unet, tmp_path, steps=0, **network_args)
    with torch.no_grad():
        resumed.load_state_dict(live)
        assert resumed.session.quantizing and torch.equal(predict(unet), drawn)
    carried = {key.rpartition(".")[2] for key in load_lora(file).others}
    expected = {"dora_wd": {"dora_scale"}, "train_norm": {"w_norm", "b_norm", "weight", "alpha"}}  # and CP convolutions
    assert carried == next((keys for name, keys in expected.items() if name in network_args), set())


def test_inputs_of_pairs_are_seen_though_nobody_calls_them(ours: ModuleType, unet: Any, tmp_path: Path) -> None:
    watched = {"importance": "activation", "collect_calibration": "true"}
    network = compressed_while_training(ours, unet, tmp_path, algo="locon", **watched)
    assert bool(network.session.state.gram.any()) and network.session.calibrated
    network.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, {})
    assert (tmp_path / "lora.calibration.safetensors").exists()


def test_a_norm_that_is_held_down_goes_into_the_weights(ours: ModuleType, unet: Any, tmp_path: Path) -> None:
    network = compressed_while_training(ours, unet, tmp_path, algo="locon")
    with torch.no_grad():
        largest = max(
            float(update.up_matrix.mul(update.scale).matmul(update.down_matrix).norm()) for update in network.updates().values()
        )
        before = changes(network)
        scaled, _, _ = network.apply_max_norm_regularization(largest / 3, "cpu")
        assert scaled and not torch.allclose(changes(network), before)
        assert all(float(module.scalar) == 1.0 for module in network.unet_loras)
        network.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, {})  # compared with what it computes, bit by bit


@pytest.mark.parametrize(
    ("network_args", "found"),
    [
        ({"algo": "loha"}, "needs pairs of down and up: choose algo=lora"),
        ({"algo": "lora", "use_scalar": "True"}, "use_scalar cannot be used"),
        ({"algo": "lora", "dora_wd": "True", "min_rank": "0"}, "would drop magnitudes of DoRA"),
    ],
    ids=["loha", "scalar", "dora"],
)
def test_what_cannot_be_compressed_while_it_trains(ours: ModuleType, unet: Any, network_args: dict[str, str], found: str) -> None:
    with pytest.raises(SettingsError, match=found):
        create(ours, unet, **{"conv_dim": "4", **IN_TRAINING, **QAT, **network_args})


def test_arguments_of_lycoris_and_no_others(ours: ModuleType, unet: Any) -> None:
    found = ours.host_arguments(lycoris)
    assert {"algo", "preset", "conv_dim", "dora_wd", "factor", "use_tucker", "train_norm", "bypass_mode", "train_t5xxl"} <= found
    with pytest.raises(SettingsError, match="block_dims: unknown setting"):
        create(ours, unet, algo="lora", block_dims="1")
