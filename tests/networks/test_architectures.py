"""The network module on every DiT that sd-scripts trains, against the host's own networks and with real forwards."""

from __future__ import annotations

import dis
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_compress import SettingsError, load_lora
from tests import architectures
from tests.architectures import Architecture

ROOT = Path(__file__).resolve().parents[2]
SPLIT = ["flux", "chroma", "sd3", "lumina", "hunyuan_image"]
ARGUMENTS = {  # as the reference tables of sd-scripts' documentation and its parsers name them
    "flux": "img_attn_dim=2 txt_attn_dim=3 img_mlp_dim=0 txt_mlp_dim=5 img_mod_dim=6 txt_mod_dim=7 single_dim=3 single_mod_dim=2 "
    "in_dims=1,2,3,4,5 train_blocks=all train_double_block_indices=0 train_single_block_indices=1 train_t5xxl=True verbose=False "
    "loraplus_lr_ratio=4 loraplus_unet_lr_ratio=5 loraplus_text_encoder_lr_ratio=6 rank_dropout=0.1 module_dropout=0.1 "
    "ggpo_sigma=0.1 ggpo_beta=0.1 network_reg_lrs=single=1e-3 conv_dim=2 conv_alpha=1",
    "flux ": "network_reg_dims=img_attn=2,single_blocks_0=3 train_blocks=double train_t5xxl=true",
    "sd3": "context_attn_dim=2 context_mlp_dim=3 context_mod_dim=4 x_attn_dim=5 x_mlp_dim=6 x_mod_dim=7 emb_dims=[1,2,3,4,5,6] "
    "train_block_indices=0 train_t5xxl=True verbose=False loraplus_unet_lr_ratio=2 rank_dropout=0.1 conv_dim=2 conv_alpha=1",
    "lumina": "attn_dim=2 mlp_dim=3 mod_dim=4 refiner_dim=5 embedder_dims=1,2,3 train_blocks=transformer "
    "module_dropout=0.1 verbose=False",
    "hunyuan_image": "network_reg_dims=img_attn=2,single=3 network_reg_lrs=double=1e-3 ggpo_sigma=0.1 ggpo_beta=0.1 verbose=False",
    "anima": "train_llm_adapter=true exclude_patterns=['.*mlp.*'] include_patterns=['blocks\\.0\\..*'] verbose=False "
    "network_reg_dims=.*q_proj=2 network_reg_lrs=.*k_proj=1e-3 loraplus_lr_ratio=2",
}


@pytest.fixture
def ours(sd_scripts: Path) -> ModuleType:
    return importlib.import_module("networks.lora_compress")


def create(module: ModuleType, target: Architecture, dim: int = 4, alpha: float = 2, **network_args: Any) -> Any:
    torch.manual_seed(3)
    return module.create_network(
        1.0, dim, alpha, None, target.text_encoders, target.model, neuron_dropout=None, dropout=None, **network_args
    )


def groups(network: Any) -> tuple[list[Any], list[str]]:
    if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        return network.prepare_optimizer_params_with_multiple_te_lrs([1e-2, 1e-2, 1e-2], 1e-2, 1e-2)
    return network.prepare_optimizer_params(1e-2, 1e-2, 1e-2)


def trained(module: ModuleType, target: Architecture, steps: int = 3, **network_args: Any) -> Any:
    """A network applied to `target` and trained through it as the host's loop does."""
    network = create(module, target, **network_args)
    network.apply_to(target.text_encoders, target.model, True, True)
    parameters, _ = groups(network)
    network.prepare_grad_etc(target.text_encoders, target.model)
    optimizer = torch.optim.AdamW([{**group, "params": list(group["params"])} for group in parameters], lr=1e-2)
    network.on_epoch_start(target.text_encoders, target.model)
    with torch.no_grad():
        goal = -target.predict()
    for _ in range(steps):
        (target.predict() - goal).square().mean().backward()
        for hook in ("update_grad_norms", "update_norms"):
            if hasattr(network, hook):
                getattr(network, hook)()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    return network


@torch.no_grad()
def reloaded(module: ModuleType, target: Architecture, file: Path) -> torch.Tensor:
    """What a new model predicts with a new network that has the ranks and the weights of `file`."""
    network, weights = module.create_network_from_weights(1.0, str(file), None, target.text_encoders, target.model)
    network.apply_to(target.text_encoders, target.model, True, True)
    info = network.load_state_dict(weights, False)
    assert not info.unexpected_keys and not info.missing_keys
    network.eval()
    return target.predict()


def pairs_of(lora: Any) -> list[tuple[Any, Any]]:
    return importlib.import_module("networks.compress_modules").pairs_of(lora)


def lost(reference: torch.Tensor, other: torch.Tensor, base: torch.Tensor) -> float:
    return float((other - reference).norm() / (reference - base).norm())


@pytest.mark.parametrize(
    ("kind", "split"), [(kind, split) for kind in architectures.KINDS for split in (False, True) if kind in SPLIT or not split]
)
@torch.no_grad()
def test_what_was_trained_is_what_is_saved(ours: ModuleType, tmp_path: Path, kind: str, split: bool) -> None:
    """Trained through the real model; packed, plain and as the host writes it, read by us and by the host's own network."""
    target = architectures.make(kind)
    copies = [target.fresh() for _ in range(4)]
    base = target.predict()
    with torch.enable_grad():
        network = trained(ours, target, bits="8", **({"split_qkv": "true"} if split else {}))
    full = target.predict()
    assert lost(full, base, base) == 1 and (full - base).norm() > 0.05 * base.norm()

    packed, host_file, plain = (tmp_path / f"{name}.safetensors" for name in ("packed", "host", "plain"))
    network.save_weights(str(packed), torch.float32, {"ss_network_dim": "4"})
    error = network.report.total.relative_error
    network.compression = type(network.compression).parse({"save_format": "kohya"})
    network.save_weights(str(host_file), None, {"ss_network_dim": "4"})
    network.compression = type(network.compression).parse({"rank_ratio": "0.9999"})
    network.save_weights(str(plain), None, {"ss_network_dim": "4"})

    assert load_lora(packed).packed and not load_lora(host_file).packed
    assert 0 < error < 0.05
    assert lost(full, reloaded(ours, copies[0], packed), base) < 0.05
    theirs = importlib.import_module(target.network)
    for module, file, copy in ((theirs, host_file, copies[1]), (ours, host_file, copies[2]), (theirs, plain, copies[3])):
        assert lost(full, reloaded(module, copy, file), base) < 1e-4
    assert {key.rpartition(".lora_")[2] for key in load_file(host_file) if ".lora_" in key} == {"down.weight", "up.weight"}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_of_the_host_mean_what_they_mean_to_it(ours: ModuleType, kind: str) -> None:
    target = architectures.make(kind.strip())
    theirs = importlib.import_module(target.network)
    arguments = dict(pair.split("=", 1) for pair in ARGUMENTS[kind].split())
    assert set(arguments) <= ours.host_arguments(theirs)
    network = create(ours, target, bits="4", **arguments)
    reference = create(theirs, target, **{name: {"true": "True"}.get(v, v) for name, v in arguments.items()})
    assert isinstance(network, type(reference))
    mine, host = (found.text_encoder_loras + found.unet_loras for found in (network, reference))
    assert [(lora.lora_name, lora.lora_dim, lora.scale) for lora in mine] == [(o.lora_name, o.lora_dim, o.scale) for o in host]
    for name in ("train_t5xxl", "train_llm_adapter"):
        assert getattr(network, name, None) == getattr(reference, name, None)
    (mine_groups, mine_names), (host_groups, host_names) = groups(network), groups(reference)
    assert mine_names == host_names and [group["lr"] for group in mine_groups] == [group["lr"] for group in host_groups]


@pytest.mark.parametrize("name", ["lora", "lora_flux", "lora_sd3", "lora_lumina", "lora_hunyuan_image", "lora_anima"])
def test_every_argument_that_the_host_reads_is_known(ours: ModuleType, name: str) -> None:
    """In its compiled code: what is looked up in kwargs, wherever that is handed on to."""
    theirs = importlib.import_module(f"networks.{name}")
    looked_up = set()
    for function in vars(theirs).values():
        for (_, holder), (_, method), (kind, key) in _triples(function):
            if holder in ("kwargs", "nw_kwargs") and method in ("get", "pop") and kind == "LOAD_CONST":
                looked_up.add(key)
    assert len(looked_up) > 9
    assert looked_up <= ours.host_arguments(theirs)


def _triples(function: Any) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Each three instructions of a function that follow one another: their names and arguments."""
    code = getattr(function, "__code__", None)
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)] if code else []
    steps = [step for step in steps if step[0] != "PUSH_NULL"]
    return zip(steps, steps[1:], steps[2:], strict=False)


@pytest.mark.parametrize("kind", SPLIT)
def test_a_split_network_has_pairs_for_every_fused_layer(ours: ModuleType, kind: str) -> None:
    target = architectures.make(kind)
    network = create(ours, target, split_qkv="True")
    fused = {name for name, _ in target.model.named_modules() if name.endswith(("qkv", "linear1")) and "txt_in" not in name}
    split = {lora.lora_name for lora in network.unet_loras if isinstance(lora.lora_down, torch.nn.ModuleList)}
    assert split == {"lora_unet_" + name.replace(".", "_") for name in fused}
    for lora in network.unet_loras:
        if lora.lora_name in split:
            assert sum(up.out_features for up in lora.lora_up) == lora.org_module.out_features


@pytest.mark.parametrize("kind", ["flux", "lumina"])
@pytest.mark.parametrize("settings", [{}, {"bits": "8"}], ids=["plain", "int8"])
@torch.no_grad()
def test_a_split_network_goes_on_from_its_own_file(ours: ModuleType, tmp_path: Path, kind: str, settings: dict[str, str]) -> None:
    target = architectures.make(kind)
    other, base = target.fresh(), target.predict()
    with torch.enable_grad():
        network = trained(ours, target, split_qkv="True", **settings)
    network.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, {})
    again = create(ours, other, split_qkv="True", alpha=1)
    again.apply_to(other.text_encoders, other.model, True, True)
    info = again.load_weights(str(tmp_path / "lora.safetensors"))
    assert not info.unexpected_keys and not info.missing_keys
    assert lost(target.predict(), other.predict(), base) < (0.05 if settings else 1e-4)
    assert all(down.weight.abs().sum(dim=1).min() > 0 for lora in again.unet_loras for down, _ in pairs_of(lora))


def test_max_norm_reaches_the_weights_of_split_modules(ours: ModuleType) -> None:
    target = architectures.make("sd3")
    network = trained(ours, target, split_qkv="True")
    before = {lora.lora_name: [up.weight.clone() for _, up in pairs_of(lora)] for lora in network.unet_loras}
    scaled, mean, most = network.apply_max_norm_regularization(0.1, "cpu")
    assert scaled > 0 and mean <= most <= 0.1 + 1e-6
    norms = [
        float((up.weight @ down.weight).norm()) * lora.scale
        for lora in network.unet_loras
        if lora.lora_name.endswith("qkv")
        for down, up in pairs_of(lora)
    ]
    assert max(norms) <= 0.1 + 1e-6
    for lora in network.unet_loras:  # shrunk and not turned
        for (_, up), old in zip(pairs_of(lora), before[lora.lora_name], strict=True):
            assert torch.allclose(up.weight * old.norm(), old * up.weight.norm(), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("flux", {"split_qkv": "True", "rank_dropout": "0.1"}, "rank_dropout cannot be used with split_qkv"),
        ("hunyuan_image", {"split_qkv": "True", "ggpo_beta": "1", "ggpo_sigma": "1"}, "ggpo_sigma cannot be used with split_qkv"),
        ("flux", {"split_qkv": "True", "img_attn_dim": "0", "txt_attn_dim": "0", "single_dim": "0"}, "none of the layers"),
        ("anima", {"split_qkv": "True"}, "split_qkv: unknown setting"),
        ("flux", {"x_attn_dim": "2"}, "x_attn_dim: unknown setting"),
        ("flux", {"base": "networks.dylora"}, "base=networks.dylora: must be one of"),
    ],
)
def test_arguments_that_cannot_work_are_refused(ours: ModuleType, kind: str, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        create(ours, architectures.make(kind), **arguments)


@pytest.mark.skipif("ARCHITECTURES_INSIDE" in os.environ, reason="runs the others")
@pytest.mark.parametrize("sd_scripts_at", ["v0.10.1"], indirect=True)
def test_the_older_version_is_saved_as_well(sd_scripts_at: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "saved or every_argument", __file__]
    environment = os.environ | {"SD_SCRIPTS_DIR": str(sd_scripts_at), "ARCHITECTURES_INSIDE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]
