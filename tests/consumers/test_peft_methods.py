"""Every method of PEFT, saved by PEFT itself: read as the update that PEFT applies after loading it, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core.layouts.files import assert_close, dense, save
from safetensors.torch import load_file
from torch import Tensor, nn

from library.compress_torchvision import declare_missing_operators
from lora_compress import CompressionSettings, FormatError, open_lora
from lora_compress.engine.to_file import compress_file

declare_missing_operators()
peft = pytest.importorskip("peft")

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 12}
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", LORA),
    "rsLoRA": ("LoraConfig", {**LORA, "use_rslora": True}),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True}),
    "patterns": ("LoraConfig", {**LORA, "rank_pattern": {"two": 2}, "alpha_pattern": {"two": 3}}),
    "orthogonal": ("LoraConfig", {**LORA, "init_lora_weights": "orthogonal"}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 6, "target_r": 4, "lora_alpha": 9, "total_step": 10}),
    "AdaLoRA without alpha": ("AdaLoraConfig", {"init_r": 6, "target_r": 4, "lora_alpha": 0, "total_step": 10}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 7}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 7}),
    "LoKr of whole matrices": ("LoKrConfig", {"r": 64, "alpha": 32}),
    "LoKr of products": ("LoKrConfig", {"r": 2, "alpha": 7, "decompose_both": True, "decompose_factor": 4}),
}
CHANGED_BASE: dict[str, dict[str, Any]] = {
    "PiSSA": {**LORA, "init_lora_weights": "pissa"},
    "OLoRA": {**LORA, "init_lora_weights": "olora"},
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "VeRA": ("VeraConfig", {"r": 4}, "VeRA"),
    "OFT": ("OFTConfig", {"r": 4, "oft_block_size": 0}, "OFT"),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}, "BOFT"),
    "IA3": ("IA3Config", {"feedforward_modules": []}, "IA3"),
    "HRA": ("HRAConfig", {"r": 4}, "HRA"),
    "MiSS": ("MissConfig", {"r": 4}, "MiSS"),
    "Bone": ("BoneConfig", {"r": 4}, "MiSS"),
    "DeLoRA": ("DeloraConfig", {"r": 4}, "DeLoRA"),
    "GraLoRA": ("GraloraConfig", {"r": 4, "gralora_k": 2}, "GraLoRA"),
    "RandLoRA": ("RandLoraConfig", {"r": 4}, "RandLoRA"),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 20}, "FourierFT"),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 20}, "WaveFT"),
    "C3A": ("C3AConfig", {"block_size": 8}, "C3A"),
    "SHiRA": ("ShiraConfig", {"r": 2}, "SHiRA"),
    "VB-LoRA": ("VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 8}, "VB-LoRA"),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["norm"]}, "LN tuning"),
    "RoAd": ("RoadConfig", {"group_size": 8}, "RoAd"),
    "HiRA": ("HiraConfig", {"r": 4}, "HiRA"),
}


class Net(nn.Module):
    """Two linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(24, 32), nn.Linear(32, 24), nn.LayerNorm(24)
        self.config = {"model_type": "none"}  # AdaLoRA and others ask for one

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.two(self.one(x)))


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def saved(name: str, values: dict[str, Any], folder: Path) -> Path:
    """A trained adapter, as PEFT saves it: every weight that is trained is a random number."""
    model = peft.get_peft_model(base(), getattr(peft, name)(**{"target_modules": ["one", "two"], **values}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def applied(folder: Path) -> dict[str, Tensor]:
    """What PEFT adds to each layer's weight once it has loaded the folder."""
    loaded = peft.PeftModel.from_pretrained(base(), folder)
    layers = {name: getattr(loaded.base_model.model, name) for name in ("one", "two")}
    return {name: layer.get_delta_weight("default").double().detach() for name, layer in layers.items()}


def read(path: Path) -> dict[str, Tensor]:
    with open_lora(path) as source:
        return {name.rpartition(".")[2]: dense(source[name]) for name in source}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_what_peft_applies(name: str, tmp_path: Path) -> None:
    path = saved(*READ[name], tmp_path)
    found, expected = read(path), applied(tmp_path)
    assert found.keys() == expected.keys()
    for layer, matrix in expected.items():
        assert_close(found[layer], matrix, 2e-6)


def test_adalora_whose_ranks_were_taken_away_keeps_its_strength(tmp_path: Path) -> None:
    """PEFT divides by the first rank, however few are left; a module of which nothing is left changes nothing."""
    values = READ["AdaLoRA"][1]
    ranks = {"one.lora_E": [True, False, True, False, False, True], "two.lora_E": [False] * 6}
    path = saved("AdaLoraConfig", {**values, "rank_pattern": ranks}, tmp_path)
    assert load_file(path)["base_model.model.one.lora_A"].shape[0] == 3
    with open_lora(path) as source:
        assert [source[name].rank for name in source] == [3] and any("every rank away" in note for note in source.notes)
    assert_close(read(path)["one"], applied(tmp_path)["one"], 2e-6)


def test_adalora_without_its_configuration_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = saved(*READ["AdaLoRA"], tmp_path)
    alone = path.rename(tmp_path / "lora.safetensors")
    with pytest.raises(FormatError, match=r"one\.lora_E: is of AdaLoRA, .*init_r .*allowed: adapter_config\.json beside"):
        open_lora(alone)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_r": None}), encoding="utf-8")
    with pytest.raises(FormatError, match="no configuration tells them"):
        open_lora(alone.rename(path))


@pytest.mark.parametrize("name", ["AdaLoRA", "LoRA"])
def test_a_compressed_file_is_plain_lora_with_the_strength_in_its_factors(name: str, tmp_path: Path) -> None:
    path, out = saved(*READ[name], tmp_path), tmp_path / "out" / "lora.safetensors"
    compress_file(path, out, CompressionSettings.parse({"new_rank": 6, "allow_larger": True}), save_dtype=torch.float32)
    found = load_file(out)
    for layer, matrix in applied(tmp_path).items():
        up, down = (found[f"base_model.model.{layer}.lora_{side}.weight"].double() for side in "BA")
        assert_close(up @ down, matrix, 1e-5)


@pytest.mark.parametrize("name", CHANGED_BASE)
def test_an_adapter_of_a_changed_base_says_so(name: str, tmp_path: Path) -> None:
    path = saved("LoraConfig", CHANGED_BASE[name], tmp_path)
    with open_lora(path) as source:
        assert any("which changes the base model" in note for note in source.notes)
    for layer, matrix in applied(tmp_path).items():
        assert_close(read(path)[layer], matrix, 2e-6)


@pytest.mark.parametrize("name", [name for name, (config, *_) in REFUSED.items() if hasattr(peft, config)])
def test_other_methods_are_refused_by_name(name: str, tmp_path: Path) -> None:
    config, values, told = REFUSED[name]
    path = saved(config, values, tmp_path)
    with pytest.raises(FormatError) as refused:
        open_lora(path)
    assert told in str(refused.value) and next(iter(load_file(path))) in str(refused.value)


@pytest.mark.parametrize(
    "key",
    [
        "x.default_lora_latent_mapping.weight",
        "x_lora_latent_mapping.weight",
        "x.lora_latent_mapping.weight",
        "x.lora_latent_mapping.default.weight",
        "x.lora_latent_mapping",
    ],
)
def test_lora_xs_is_read_with_its_middle(key: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, middle, up = torch.randn(3, 8), torch.randn(3, 3), torch.randn(6, 3)
    tensors = {"x.lora_A.weight": down, "x.lora_B.weight": up, key: middle}
    path = save(tensors, tmp_path, {"lora_adapter_metadata": json.dumps({"r": 3, "lora_alpha": 6})})
    with open_lora(path) as source:
        assert list(source) == ["x"] and not source.others
        assert_close(dense(source["x"]), 2.0 * up.double() @ middle.double() @ down.double(), 1e-6)


def test_half_a_lora_of_an_embedding_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(3, 2), "e.lora_embedding_A": torch.ones(2, 9)}
    with pytest.raises(FormatError, match=r"e\.lora_embedding_B: is missing"):
        open_lora(save(tensors, tmp_path))


@pytest.mark.parametrize("name", READ)
def test_a_folder_of_any_method_that_is_read_becomes_one_that_peft_applies_alike(name: str, tmp_path: Path) -> None:
    saved(*READ[name], tmp_path / "in")
    expected = applied(tmp_path / "in")
    settings = CompressionSettings.parse({"new_rank": 24, "allow_larger": True})
    compress_file(tmp_path / "in", tmp_path / "out", settings, save_dtype=torch.float32)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and sorted(config["target_modules"]) == ["one", "two"]
    for layer, matrix in applied(tmp_path / "out").items():
        assert_close(matrix, expected[layer], 1e-5)
