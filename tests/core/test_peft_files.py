"""The strength of files of PEFT: configurations and headers that are true, and what is stated where neither is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_compress import CompressionSettings, FormatError, SettingsError, compress_file, expand_file, open_lora
from lora_compress.cli import main
from lora_compress.inspection.comparison import compare_files
from lora_compress.inspection.file import inspect_file


def peft_file(folder: Path) -> Path:
    """Two modules of rank 8, one three times as strong as the other, alpha 16."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    falling = torch.logspace(0, -2, 8).unsqueeze(1)
    for name, strength in (("strong", 3.0), ("weak", 1.0)):
        tensors[f"unet.{name}.to_q.lora_A.weight"] = torch.randn(8, 64, generator=generator) * falling * strength
        tensors[f"unet.{name}.to_q.lora_B.weight"] = torch.randn(48, 8, generator=generator)
    config = {"unet.r": 8, "unet.lora_alpha": 16, "unet.target_modules": ["to_q"]}
    save_file(tensors, folder / "in.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    return folder / "in.safetensors"


@pytest.mark.parametrize("values", [{"rank_ratio": 0.5, "min_rank": 1}, {"bits": 4, "rank_ratio": 0.5, "min_rank": 1}], ids=str)
def test_the_configuration_tells_the_ranks_of_the_file_that_holds_it(values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    compress_file(peft_file(tmp_path), path, CompressionSettings.parse(values))
    if "bits" in values:
        expand_file(path, path, force=True)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
        ranks = {name: len(file.get_tensor(f"unet.{name}.to_q.lora_A.weight")) for name in ("strong", "weak")}
    assert ranks["strong"] != ranks["weak"] and sum(ranks.values()) == 8
    told = {name: config["unet.rank_pattern"].get(f"{name}.to_q", config["unet.r"]) for name in ranks}
    assert told == ranks
    assert {name: config["unet.alpha_pattern"].get(f"{name}.to_q", config["unet.lora_alpha"]) for name in ranks} == ranks


# What is stated where a file does not tell its strength


def bare(folder: Path, name: str = "adapter_model.safetensors", metadata: dict[str, str] | None = None) -> Path:
    """Two modules of PEFT's of rank 4, without a configuration."""
    folder.mkdir(exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for module in ("a", "b"):
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, 48, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(40, 4, generator=generator)
    save_file(tensors, folder / name, metadata)
    return folder / name


def strength(path: Path, **stated: object) -> float:
    """What up @ down is multiplied by."""
    with open_lora(path, **stated) as lora:
        return lora["base_model.model.a"].scale


UNKNOWN = "the strength of the file is not known"


def test_a_file_of_peft_without_its_configuration_is_noted_and_takes_a_statement(tmp_path: Path) -> None:
    path = bare(tmp_path / "in")
    config = tmp_path / "elsewhere.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["a", "b"]}))
    with open_lora(path) as lora:
        assert [note for note in lora.notes if UNKNOWN in note and "--alpha" in note and "--peft_config" in note]
    assert strength(path) == 1.0
    assert strength(path, alpha=12) == 3.0
    assert strength(path, peft_config=config) == 4.0
    with open_lora(path, alpha=12) as lora:
        assert not any(UNKNOWN in note for note in lora.notes)
    assert main(["--model", str(path), "--save_to", str(tmp_path / "out.safetensors"), "--new_rank", "2", "--alpha", "12"]) == 0
    assert compare_files(path, tmp_path / "out.safetensors", alpha=12).relative_error < 0.8  # the output knows its own strength
    assert inspect_file(path, alpha=12).modules[0].norm == pytest.approx(3 * inspect_file(path).modules[0].norm)
    folder = tmp_path / "folder"
    assert main(["--model", str(path), "--save_to", f"{folder}/", "--new_rank", "2", "--peft_config", str(config)]) == 0
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (2, 2, ["a", "b"])
    assert compare_files(folder, path, peft_config=config).modules[0].relative_error < 1.0
    assert strength(folder, peft_config=config) == 1.0  # which is that of another rank, and of no use for what we wrote


@pytest.mark.parametrize("flags", [["--alpha", "0"], ["--alpha", "nan"], ["--peft_config", "nowhere.json"]], ids=str)
def test_a_statement_that_states_nothing_is_wrong_usage(flags: list[str], tmp_path: Path) -> None:
    assert (
        main(["--model", str(bare(tmp_path / "in")), "--save_to", str(tmp_path / "o.safetensors"), "--new_rank", "2", *flags]) == 2
    )
    assert not (tmp_path / "o.safetensors").exists()


def test_a_batch_takes_a_statement_for_files_that_tell_nothing(tmp_path: Path) -> None:
    bare(tmp_path / "in", "one.safetensors")
    bare(tmp_path / "in", "two.safetensors", {"ss_compress_bits": "16"})  # ours: its strength is known
    assert main(["--model", str(tmp_path / "in"), "--save_to", str(tmp_path / "out"), "--new_rank", "2", "--alpha", "8"]) == 0
    norms = [inspect_file(tmp_path / "out" / f"{name}.safetensors").modules[0].norm for name in ("one", "two")]
    assert norms[0] == pytest.approx(2 * norms[1], rel=1e-3)


def adapter(folder: Path, rank: int = 4, alpha: int = 16) -> Path:
    path = bare(folder)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["a", "b"],
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("same", [True, False], ids=["that of the input", "another one"])
def test_a_file_beside_a_configuration_that_would_be_applied_to_it_is_refused(same: bool, tmp_path: Path) -> None:
    source, out = adapter(tmp_path / "in"), tmp_path / "out"
    adapter(out, alpha=16 if same else 3)
    (out / "adapter_model.safetensors").unlink()
    before = (out / "adapter_config.json").read_bytes()
    for values in ({"new_rank": 2}, {"bits": 4}):
        with pytest.raises(SettingsError, match=r"adapter_config\.json, which PEFT would apply to it.*--save_to .*out/"):
            compress_file(source, out / "adapter_model.safetensors", CompressionSettings.parse(values))
    assert (out / "adapter_config.json").read_bytes() == before and len(list(out.iterdir())) == 1
    compress_file(source, out / "small.safetensors", CompressionSettings.parse({"new_rank": 2}))  # nobody takes it for that one's
    assert strength(out / "small.safetensors") == 1.0


def test_a_configuration_of_another_rank_is_refused_by_name(tmp_path: Path) -> None:
    path = adapter(tmp_path / "in", rank=8)
    with pytest.raises(FormatError, match=r"a\.lora_A\.weight: has rank 4, and .*adapter_config\.json says 8"):
        open_lora(path)
    with open_lora(path, repair=True) as lora:
        assert lora["base_model.model.a"].scale == 4.0


def test_the_input_folder_is_replaced_on_demand_alone(tmp_path: Path) -> None:
    source = adapter(tmp_path / "in")
    with pytest.raises(SettingsError, match="is the input itself"):
        compress_file(tmp_path / "in", tmp_path / "in", CompressionSettings.parse({"new_rank": 2}))
    with open_lora(source) as lora:
        expected = lora["base_model.model.a"].dense()
    report = compress_file(tmp_path / "in", tmp_path / "in", CompressionSettings.parse({"new_rank": 3}), force=True)
    with open_lora(tmp_path / "in") as lora:
        found = lora["base_model.model.a"].dense()
    assert report.status == "written" and (found - expected).norm() < 0.6 * expected.norm()


def test_anchored_patterns_of_a_folder_are_those_of_names_without_peft_s_prefix(tmp_path: Path) -> None:
    path = adapter(tmp_path / "in")
    config = json.loads((path.parent / "adapter_config.json").read_text())
    (path.parent / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"^a": 2}}))
    assert strength(path) == 0.5


# Headers


@pytest.mark.parametrize("prefix", ["", "lora_", "network_", "base_model.lora_"])
def test_alpha_and_rank_of_a_header_go_with_the_ranks(prefix: str, tmp_path: Path) -> None:
    """A program that divides the header's alpha by the rank of the tensors applies what it applied before."""
    path = bare(tmp_path / "in", "x.safetensors", {f"{prefix}alpha": "16", "rank": "4", "title": "alpha"})
    with open_lora(path) as lora:
        assert any("its header says alpha 16" in note for note in lora.notes)
    for stated, expected in (({}, "8"), ({"alpha": 16.0}, "2")):
        report = compress_file(path, tmp_path / "out.safetensors", CompressionSettings.parse({"new_rank": 2}), **stated)
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            metadata = file.metadata()
        assert (metadata[f"{prefix}alpha"], metadata["rank"], metadata["title"]) == (expected, "2", "alpha")
        assert any("brought up to date" in note and "rank 4 is now 2" in note for note in report.notes)


def test_alpha_that_no_longer_fits_all_modules_is_taken_out_of_the_header(tmp_path: Path) -> None:
    path = peft_file(tmp_path)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"unet.lora_alpha": "8", "unet.r": "8", "alpha_pattern": "{}"})
    settings = CompressionSettings.parse({"rank_ratio": 0.5, "min_rank": 1})
    report = compress_file(path, tmp_path / "out.safetensors", settings)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert not {"unet.lora_alpha", "unet.r", "alpha_pattern"} & set(file.metadata())
    assert any("unet.lora_alpha 8 was taken out" in note for note in report.notes)
    for values in ({"bits": 8}, {"new_rank": 4, "bits": 8}):
        compress_file(path, tmp_path / "packed.safetensors", CompressionSettings.parse(values))
        expand_file(tmp_path / "packed.safetensors", tmp_path / "plain.safetensors")
        with safe_open(tmp_path / "plain.safetensors", "pt") as file:
            rank = str(values.get("new_rank", 8))
            assert (file.metadata()["unet.lora_alpha"], file.metadata()["unet.r"]) == (rank, rank)
