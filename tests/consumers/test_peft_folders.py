"""Folders of PEFT go in and come out: PEFT itself loads them, and every layer gets the update that the report speaks of."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.compress_torchvision import declare_missing_operators
from lora_compress import CompressionSettings, FileReport, SettingsError, compress_file, expand_file, open_lora
from lora_compress.cli import main

declare_missing_operators()
peft = pytest.importorskip("peft")

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CHANGED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
TARGETS = ["to_q", "to_k", "proj_out", "conv", "tokens"]


class Block(nn.Module):
    """Three linear layers, one of which has a namesake outside of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.proj_out = nn.Linear(32, 24), nn.Linear(32, 24), nn.Linear(32, 40)


class Net(nn.Module):
    """Every kind of layer that PEFT trains."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.conv, self.tokens = nn.Conv2d(8, 16, 3), nn.Embedding(50, 32)
        self.proj_out, self.head = nn.Linear(32, 40), nn.Linear(24, 5)
        self.config = {"model_type": "none"}  # AdaLoRA asks for one

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.blocks[0].to_q(self.tokens(numbers)))


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """What PEFT adds to each layer's weight, by the layer's name."""
    found = {}
    for name, layer in model.named_modules():
        if adapter in getattr(layer, "scaling", {}):
            found[name.removeprefix("base_model.model.")] = layer.get_delta_weight(adapter).detach().double()
    return found


def trained(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Save an adapter of random factors, one module weak, and give its updates."""
    model = peft.get_peft_model(base(), peft.LoraConfig(**{"target_modules": TARGETS, "r": 4, "lora_alpha": 16, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * (0.002 if "blocks.1.to_k.lora_B" in name else 0.2)
                )
            elif parameter.requires_grad:
                parameter.add_(0.5)
    model.save_pretrained(str(folder))
    return deltas(model)


def loaded(folder: Path) -> Any:
    """PEFT's model of a folder; no warning of PEFT is allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return peft.PeftModel.from_pretrained(base(), str(folder))


def check(folder: Path, before: dict[str, Tensor], report: FileReport | None) -> dict[str, Tensor]:
    """PEFT computes what our reader reads and what the report says."""
    after = deltas(loaded(folder))
    assert after.keys() == before.keys()
    with open_lora(folder) as lora:
        assert {name.removeprefix("base_model.model.") for name in lora} == after.keys()
        for name, delta in after.items():
            update = lora[f"base_model.model.{name}"].dense()
            torch.testing.assert_close(update, delta.T if name == "tokens" else delta.flatten(1), rtol=1e-5, atol=1e-7)
    error = sum(float((before[name] - after[name]).square().sum()) for name in before)
    relative = (error / sum(float(delta.square().sum()) for delta in before.values())) ** 0.5
    if report is not None:
        assert relative == pytest.approx(report.relative_error, rel=1e-4, abs=1e-6)
    return after


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA with patterns": {
        "use_rslora": True,
        "rank_pattern": {"proj_out": 6, "conv": 8},
        "alpha_pattern": {"^proj_out": 3, "to_q": 5},
    },
    "DoRA": {"use_dora": True, "modules_to_save": ["head"]},
    "bias": {"bias": "all", "lora_dropout": 0.1},
    "bias of the factors": {"lora_bias": True, "target_modules": ["to_q", "to_k", "proj_out"]},
    "random where nothing is loaded": {"init_lora_weights": False},
}
WAYS: dict[str, dict[str, Any]] = {
    "new_rank": {"new_rank": 2},
    "target_error": {"target_error": 0.3},
    "target_size": {"target_size": None},  # three quarters of what it was
    "dropped modules": {"rank_ratio": 0.5, "min_rank": 1, "layer_threshold": 0.001},
}


PRECISION = {"target_size": torch.float16}  # otherwise that of the input, float32


@pytest.mark.parametrize("values", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_peft_loads_what_the_report_says(options: dict[str, Any], values: dict[str, Any], tmp_path: Path) -> None:
    before = trained(tmp_path / "in", **options)
    size = (tmp_path / "in" / WEIGHTS).stat().st_size * 3 // 4
    asked = {name: f"{size / 1000:.2f}KB" if value is None else value for name, value in values.items()}
    report = compress_file(
        tmp_path / "in", tmp_path / "out", CompressionSettings.parse(asked), save_dtype=PRECISION.get(next(iter(values)))
    )
    assert report.status == "written" and report.output == str(tmp_path / "out")
    check(tmp_path / "out", before, report)
    old, new = config(tmp_path / "in"), config(tmp_path / "out")
    assert old.keys() == new.keys() and {key for key in old if old[key] != new[key]} <= CHANGED


def test_modules_to_save_and_magnitudes_are_those_of_the_input(tmp_path: Path) -> None:
    trained(tmp_path / "in", use_dora=True, modules_to_save=["head"])
    compress_file(tmp_path / "in", tmp_path / "out", CompressionSettings.parse(WAYS["dropped modules"]))
    one, other = (dict(loaded(tmp_path / name).named_parameters()) for name in ("in", "out"))
    kept = [name for name in one if "magnitude" in name or "modules_to_save" in name]
    assert len(kept) > 10
    assert all(torch.equal(one[name], other[name]) for name in kept)


@pytest.mark.parametrize("name", ["in", f"in/{WEIGHTS}"])
@pytest.mark.parametrize("save_to", ["out/", "out", f"out/{WEIGHTS}"])
def test_the_command_writes_a_folder(name: str, save_to: str, tmp_path: Path) -> None:
    before = trained(tmp_path / "in")
    assert main(["--model", str(tmp_path / name), "--save_to", f"{tmp_path}/{save_to}", "--new_rank", "2"]) == 0
    check(tmp_path / "out", before, None)
    assert main(["--model", str(tmp_path / name), "--save_to", f"{tmp_path}/{save_to}", "--new_rank", "3"]) == 0  # again, over it
    check(tmp_path / "out", before, None)


def test_a_folder_that_holds_the_same_configuration_gets_its_own(tmp_path: Path) -> None:
    before = trained(tmp_path / "in")
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "in" / CONFIG, tmp_path / "out" / CONFIG)
    check(tmp_path / "out", before, compress_file(tmp_path / "in", tmp_path / "out", CompressionSettings.parse({"new_rank": 2})))


def test_weights_of_torch_save_become_a_folder(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    before = trained(tmp_path / "in")
    torch.save(load_file(tmp_path / "in" / WEIGHTS), tmp_path / "in" / "adapter_model.bin")
    (tmp_path / "in" / WEIGHTS).unlink()
    check(tmp_path / "out", before, compress_file(tmp_path / "in", tmp_path / "out", CompressionSettings.parse({"new_rank": 2})))


def test_a_batch_of_folders_is_one_of_folders(tmp_path: Path) -> None:
    before = {}
    for place in ("style/unet", "style/text_encoder", "other"):
        before[place] = trained(tmp_path / "in" / place, lora_alpha=len(place))
        torch.save({"state": {}}, tmp_path / "in" / place / "optimizer.pt")  # a trainer's, beside the weights
    command = ["--model", str(tmp_path / "in"), "--save_to", str(tmp_path / "out"), "--new_rank", "2", "--save_precision", "fp16"]
    assert main(command) == 0
    written = sorted((tmp_path / "out").rglob("*.safetensors"))
    assert [path.parent.relative_to(tmp_path / "out").as_posix() for path in written] == sorted(before)
    times = [path.stat().st_mtime_ns for path in written]
    for place, updates in before.items():
        check(tmp_path / "out" / place, updates, None)
    assert main(["--model", f"{tmp_path}/in/*", "--save_to", f"{tmp_path}/matched", "--new_rank", "2"]) == 0
    assert [path.parent.name for path in (tmp_path / "matched").rglob(CONFIG)] == ["other"]  # the folder that matches
    check(tmp_path / "matched" / "other", before["other"], None)
    (tmp_path / "out" / "other" / CONFIG).unlink()
    assert main(command) == 0  # goes on: only what is not whole is made again
    assert [path.stat().st_mtime_ns == time for path, time in zip(written, times, strict=True)] == [False, True, True]
    check(tmp_path / "out" / "other", before["other"], None)


def test_a_packed_file_becomes_a_folder_again(tmp_path: Path) -> None:
    before = trained(tmp_path / "in", modules_to_save=["head"])
    packed = tmp_path / "packed.safetensors"
    report = compress_file(tmp_path / "in", packed, CompressionSettings.parse({"bits": 8}))
    assert expand_file(packed, tmp_path / "out", save_dtype=torch.float32).output == str(tmp_path / "out")
    check(tmp_path / "out", before, report)
    larger = CompressionSettings.parse({"new_rank": 2, "allow_larger": True})
    compress_file(packed, tmp_path / "plain", larger, save_dtype=torch.float32)
    smaller = compress_file(
        tmp_path / "out", tmp_path / "again", CompressionSettings.parse({"new_rank": 2}), save_dtype=torch.float32
    )
    check(tmp_path / "again", deltas(loaded(tmp_path / "out")), smaller)
    check(tmp_path / "plain", deltas(loaded(tmp_path / "out")), smaller)


def test_a_module_that_a_packed_file_lacks_is_zero_for_peft(tmp_path: Path) -> None:
    before = trained(tmp_path / "in", init_lora_weights=False)
    compress_file(
        tmp_path / "in", tmp_path / "packed.safetensors", CompressionSettings.parse({"bits": 8, "layer_threshold": 0.001})
    )
    expand_file(tmp_path / "packed.safetensors", tmp_path / "out")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        after = deltas(peft.PeftModel.from_pretrained(base(), str(tmp_path / "out")))
    gone = [name for name, delta in after.items() if not delta.any()]
    assert gone == ["blocks.1.to_k"]
    assert all((after[name] - before[name]).norm() < 0.05 * before[name].norm() for name in before if name not in gone)


def test_a_packed_file_is_no_folder(tmp_path: Path) -> None:
    trained(tmp_path / "in")
    with pytest.raises(SettingsError, match=r"PEFT reads no packed files.*name a file, .*out\.safetensors"):
        compress_file(tmp_path / "in", tmp_path / "out", CompressionSettings.parse({"bits": 4}))
    assert not (tmp_path / "out").exists()


def test_adalora_comes_out_as_a_folder_of_plain_lora(tmp_path: Path) -> None:
    options = {"init_r": 6, "target_r": 4, "lora_alpha": 9, "total_step": 10, "target_modules": ["to_q", "proj_out"]}
    model = peft.get_peft_model(base(), peft.AdaLoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(str(tmp_path / "in"))
    report = compress_file(tmp_path / "in", tmp_path / "out", CompressionSettings.parse({"new_rank": 3}))
    check(tmp_path / "out", deltas(model), report)
    written = config(tmp_path / "out")
    assert written["peft_type"] == "LORA" and "init_r" not in written


def test_a_folder_that_comes_out_under_other_keys_is_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(base(), peft.LoHaConfig(r=3, alpha=7, target_modules=["to_q"], init_weights=False))
    model.save_pretrained(str(tmp_path / "in"))
    about = tmp_path / "in" / CONFIG
    about.write_text(about.read_text(encoding="utf-8").replace('"LOHA"', '"LORA"'), encoding="utf-8")  # of another program
    with pytest.raises(SettingsError, match=r"is a folder for PEFT, which could not read .*name a safetensors file"):
        compress_file(tmp_path / "in", tmp_path / "out", CompressionSettings.parse({"new_rank": 3}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_model_by_its_rank_is_refused(way: str, tmp_path: Path) -> None:
    trained(tmp_path / "in", init_lora_weights=way, target_modules=["to_q", "to_k"])
    with pytest.raises(SettingsError, match=f"init_lora_weights is '{way}'.*convert it with PEFT"):
        compress_file(tmp_path / "in", tmp_path / "out", CompressionSettings.parse({"new_rank": 2}))


def test_an_odd_rank_can_be_loaded_whatever_the_adapter_began_as(tmp_path: Path) -> None:
    before = trained(tmp_path / "in", init_lora_weights="orthogonal", target_modules=["to_q", "to_k"])
    report = compress_file(tmp_path / "in", tmp_path / "out", CompressionSettings.parse({"new_rank": 3}))
    check(tmp_path / "out", before, report)


REAL: dict[str, Callable[[Any], dict[str, Any]]] = {
    "peft_clip_text_encoder": lambda real: {"new_rank": 2},
    "peft_unet_partly_zero": lambda real: {"rank_ratio": 0.5, "min_rank": 1},
}


@pytest.mark.parametrize("name", REAL)
def test_real_folders_come_out_as_strong_as_the_report_says(name: str, real_lora: Callable[[str], Path], tmp_path: Path) -> None:
    source = real_lora(name)
    report = compress_file(source, tmp_path / "out", CompressionSettings.parse(REAL[name](None)))
    with open_lora(source) as one, open_lora(tmp_path / "out") as other:
        assert list(one) and set(one) == set(other)
        model = peft.PeftModel.from_pretrained(skeleton(one), str(tmp_path / "out"))
        after = deltas(model)
        error = norm = 0.0
        for key in one:
            dense, mine = one[key].dense(), other[key].dense()
            torch.testing.assert_close(after[key.removeprefix("base_model.model.")], mine, rtol=1e-5, atol=1e-8)
            error, norm = error + float((dense - mine).square().sum()), norm + float(dense.square().sum())
    assert (error / norm) ** 0.5 == pytest.approx(report.relative_error, rel=1e-4)


def skeleton(lora: Any) -> nn.Module:
    """A model with the linear layers of an adapter under their names, and nothing else."""
    root = nn.Module()
    for name, shape in lora.shapes.items():
        parent, parts = root, name.removeprefix("base_model.model.").split(".")
        for part in parts[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(parts[-1], nn.Linear(shape.inputs, shape.outputs, bias=False))
    return root


@pytest.mark.parametrize("options", [{}, ADAPTERS["rsLoRA with patterns"]], ids=["plain", "rsLoRA with patterns"])
def test_a_header_of_diffusers_means_to_us_what_it_means_to_diffusers(options: dict[str, Any], tmp_path: Path) -> None:
    """diffusers makes a LoraConfig of the header's fields for the model: read so, and written so that it gets the same updates."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    targets = ["to_q", "to_k", "proj_out", "conv"]
    before = trained(tmp_path / "in", target_modules=targets, **options)
    tensors = {key.replace("base_model.model", "unet"): t for key, t in load_file(tmp_path / "in" / WEIGHTS).items()}
    fields = {key: value for key, value in config(tmp_path / "in").items() if key in CHANGED | {"target_modules"}}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in fields.items()})}
    save_file(tensors, tmp_path / "in.safetensors", header)
    report = compress_file(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", CompressionSettings.parse({"target_error": 0.3})
    )
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    model = base()
    peft.inject_adapter_in_model(peft.LoraConfig(**{key.removeprefix("unet."): value for key, value in told.items()}), model)
    state = {key.removeprefix("unet."): t for key, t in load_file(tmp_path / "out.safetensors").items()}
    assert not peft.set_peft_model_state_dict(model, state).unexpected_keys
    after = deltas(model)
    with open_lora(tmp_path / "in.safetensors") as one, open_lora(tmp_path / "out.safetensors") as other:
        for name, delta in before.items():
            torch.testing.assert_close(one[f"unet.{name}"].dense(), delta.flatten(1), rtol=1e-5, atol=1e-7)
            mine = other[f"unet.{name}"].dense() if f"unet.{name}" in other else torch.zeros_like(delta.flatten(1))
            torch.testing.assert_close(after[name].flatten(1), mine, rtol=1e-5, atol=1e-7)
    assert any("lora_adapter_metadata" in note for note in report.notes)
