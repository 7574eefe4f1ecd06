"""Flags: sd-scripts' own, lora-scripts' writing, a flag for every setting, and errors that say what to do."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core.compressors import lora_file

from lora_compress import CompressionSettings, QatSettings, QuantizationSettings, TrainingSettings, setting_names
from lora_compress.batch import CompressOptions
from lora_compress.cli import main, paths
from lora_compress.cli.arguments import UsageError, quantize_pairs
from lora_compress.cli.compress import _parser, read_options
from lora_compress.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[3]


def _options(*words: str) -> CompressOptions:
    return read_options(_parser().parse(["--model", "in", "--save_to", "out", *words]))


def _refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The sentence of a command that is used wrongly."""
    assert main([str(word) for word in words]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ")
    return shown.err.removeprefix("error: ").strip()


def test_every_flag_of_sd_scripts_is_taken(sd_scripts: Path) -> None:
    theirs = importlib.import_module("networks.resize_lora").setup_parser()
    ours = {option: action for action in _parser()._actions for option in action.option_strings}
    for action in theirs._actions:
        for option in action.option_strings:
            assert option in ours, option
            assert (action.nargs == 0) == (ours[option].nargs == 0), f"{option}: one is a switch, the other is not"
    command = (
        "--save_precision bf16 --new_rank 8 --new_conv_rank 4 --save_to o.safetensors --model i.safetensors --device cpu --verbose"
    )
    dynamic = "--dynamic_method sv_ratio --dynamic_param 5.5 --svd_lowrank_niter 2"
    args = _parser().parse(f"{command} {dynamic}".split())
    options = read_options(args)
    known = theirs.parse_args(f"{command} {dynamic}".split())
    pruning = options.settings.pruning
    assert (pruning.new_rank, pruning.new_conv_rank) == (known.new_rank, known.new_conv_rank)
    assert (pruning.dynamic_method, pruning.dynamic_param) == (known.dynamic_method, known.dynamic_param)
    assert (options.save_dtype, args.model, args.save_to) == (torch.bfloat16, known.model, known.save_to)


def test_every_setting_that_a_finished_file_can_follow_has_a_flag() -> None:
    quantize = {field.name for field in dataclasses.fields(QuantizationSettings)}
    training = {field.name for part in (TrainingSettings, QatSettings) for field in dataclasses.fields(part)}
    destinations = {action.dest for action in _parser()._actions}
    assert set(setting_names()) - quantize - training <= destinations
    assert not (quantize | training) & destinations
    for name in quantize:
        assert quantize_pairs([f"{name}=1"]) == {name: "1"}


def test_settings_come_out_as_they_went_in() -> None:
    options = _options("--rank_ratio", "0.5", "--min_rank", "2", "--quantize", "bits=4", "strategy=nf4", "--format", "both")
    assert options.settings == CompressionSettings.parse(
        {"rank_ratio": "0.5", "min_rank": "2", "bits": "4", "strategy": "nf4", "save_format": "both"}
    )
    assert options.writes_partner
    assert _options("--target_size", "20MB").settings.budget.size == 20_000_000
    assert _options("--new_rank", "4").save_dtype is None  # that of the input
    assert _options("--for", "comfyui", "diffusers").consumers == ("comfyui", "diffusers")
    assert _options("--quantize", "bits=4", "--quantize", "strategy=nf4").settings.quantization.codec_name == "nf4"


def test_the_flags_of_trainings_mean_the_same_here() -> None:
    for name in ("--quantize", "--quantization"):
        words = ("--pruning", "rank_ratio=0.5", "min_rank=2", "target_size=3MB", name, "bits=4", "strategy=nf4", "save_format=both")
        found = _options(*words).settings
        assert found == CompressionSettings.parse(
            {"rank_ratio": 0.5, "min_rank": 2, "target_size": "3MB", "bits": 4, "strategy": "nf4", "save_format": "both"}
        )
    assert _options("--new_rank", "4", "--quantization", "enabled=false", "bits=4").settings == _options("--new_rank", "4").settings
    assert _options("--pruning", "rank_ratio=0.5", "--rank_ratio", "0.5").settings.pruning.rank_ratio == 0.5


def test_every_flag_of_the_training_script_is_taken_or_told_what_to_do_instead() -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module("library.compress_config").add_arguments(parser, ["sd"])
    ours = {option for action in _parser()._actions for option in action.option_strings}
    for option in {option for action in parser._actions for option in action.option_strings} - ours:
        with pytest.raises(UsageError, match="is a flag of") as refused:
            _options("--new_rank", "4", option, "x")
        assert "unknown" not in str(refused.value)


def test_programs_are_named_apart_or_with_commas() -> None:
    for words in (["comfyui", "diffusers"], ["comfyui,diffusers"], ["comfyui,", "diffusers"], ["comfyui", "--for", "diffusers"]):
        assert _options("--for", *words).consumers == ("comfyui", "diffusers")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("v1.5", "v1.5.safetensors"),
        ("v1", "v1.safetensors"),
        ("my.lora", "my.lora.safetensors"),
        ("style.v2.fp16", "style.v2.fp16.safetensors"),
        ("a.b.safetensors", "a.b.safetensors"),
        ("new.folder/v2.0", "new.folder/v2.0.safetensors"),
    ],
)
def test_an_ending_that_no_file_has_is_part_of_the_name(given: str, meant: str, tmp_path: Path) -> None:
    assert paths.check_output(str(tmp_path / given)) == str(tmp_path / meant)
    source = lora_file(tmp_path / "source.safetensors")
    assert main(["--model", str(source), "--save_to", str(tmp_path / given), "--new_rank", "1"]) == 0
    assert (tmp_path / meant).is_file()
    with pytest.raises(UsageError, match="is the input"):
        paths.check_output(str(tmp_path / given), [str(tmp_path / meant)])


def test_a_command_that_is_misspelt_is_told_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "chek: unknown command, did you mean check?" in _refusal(capsys, "chek", "--model", "a.safetensors")


def test_lora_scripts_writing() -> None:
    args = _parser().parse(["--src_model", "a.safetensors", "--dst_model", "b.safetensors", "--quantize", "bits=4"])
    assert (args.model, args.save_to, args.quantize) == ("a.safetensors", "b.safetensors", ["bits=4"])


def test_one_criterion_leaves_the_others_alone() -> None:
    """sd-scripts' default of --new_rank 4 would cap every other choice."""
    assert _options("--rank_ratio", "0.5").settings.pruning.new_rank is None
    assert _options("--dynamic_method", "sv_ratio", "--dynamic_param", "5").settings.pruning.new_rank is None


@pytest.mark.parametrize("asked", [("--save_precision", "fp16"), ("--format", "fp8"), ("--force_resize",), ("--for", "all")])
def test_a_conversion_alone_is_something_to_do(asked: tuple[str, ...]) -> None:
    assert not _options(*asked).settings.pruning.enabled


def test_nothing_asked_for_names_three_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lora_file(tmp_path / "a.safetensors")
    for extra in ((), ("--min_rank", "2"), ("--device", "cpu"), ("--verbose",)):
        said = _refusal(capsys, "--model", source, "--save_to", tmp_path / "b.safetensors", *extra)
        assert said.startswith("nothing is asked for") and all(
            flag in said for flag in ("--new_rank 16", "--target_error 0.05", "--target_size 20MB")
        )
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--new_rnak", "4"], r"--new_rnak: unknown flag, did you mean --new_rank?"),
        (["--new_rank", "four"], "--new_rank 'four': must be a whole number"),
        (["--rank_ratio", "2"], "--rank_ratio 2: must lie in (0, 1]"),
        (["--bits", "4"], "--bits: is a part of --quantize: write --quantize bits=..."),
        (["--group-size", "32"], "--group-size: is a part of --quantize: write --quantize group_size=..."),
        (["--new-rank", "4"], "--new-rank: unknown flag, did you mean --new_rank?"),
        (["--Save_To", "4"], "--Save_To: unknown flag, did you mean --save_to?"),
        (["--network_dim", "4"], "--network_dim: is a flag of training scripts, did you mean --new_rank?"),
        (["--network_args", "bits=4"], "did you mean --pruning or --quantization?"),
        (["--adaptive", "mode=fid_gap"], "--adaptive: is a flag of train_network_ext.py alone"),
        (["--qat", "true"], "--qat: is a setting of trainings"),
        (["--quantize", "qat=true"], "qat is no part of --quantize: it is a setting of trainings"),
        (["--pruning", "bits=4"], "bits is no part of --pruning: it belongs to --quantize bits=4"),
        (["--pruning", "rank_ration=0.5"], "did you mean rank_ratio?"),
        (["--pruning", "rank_ratio=0.5", "--rank_ratio", "0.4"], "--rank_ratio 0.4: rank_ratio=0.5 is given too"),
        (["--quantization", "enabled=perhaps"], "--quantize enabled=perhaps: must be true or false"),
        (["--quantize", "4"], "--quantize 4: must be NAME=VALUE with NAME one of"),
        (["--quantize", "bit=4"], "--quantize bit=4: bit is no part of --quantize, did you mean bits?"),
        (["--quantize", "rank_ratio=0.5"], "it is a flag of its own, --rank_ratio 0.5"),
        (["--quantize", "bits=4", "group_size=7"], "--quantize group_size=7"),
        (["--save_precision", "fp12", "--new_rank", "4"], "--save_precision: invalid choice: 'fp12'"),
        (["--for", "photoshop", "--new_rank", "4"], "invalid choice: 'photoshop'"),
        (["--new_rank"], "--new_rank: expected one argument"),
        (["stray.safetensors", "--new_rank", "4"], "stray.safetensors: belongs to no flag"),
        (["--target_size", "20XB"], "--target_size 20xb: must be a size such as 20MB"),
        (["--target_size", "20MB", "--target_error", "0.1"], "two budgets"),
        (["--dynamic_method", "sv_ratio"], "dynamic_param"),
        (["--truncate", "8MB", "--new_rank", "4"], "--truncate 8MB: cuts a progressive file as it is"),
        (["--truncate", "much"], "--truncate much: must be a size"),
        (["--new_rank", "4", "--base_model", "none.safetensors"], "--base_model none.safetensors: no such file"),
        (["--new_rank", "4", "--executor", "ray"], "--executor ray: spreads a batch"),
    ],
)
def test_wrong_usage_is_one_sentence(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lora_file(tmp_path / "a.safetensors")
    sentence = _refusal(capsys, "--model", source, "--save_to", tmp_path / "b.safetensors", *words)
    assert said in sentence and len(sentence.splitlines()) == 1
    assert not (tmp_path / "b.safetensors").exists()


def test_outputs_are_checked_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lora_file(tmp_path / "a.safetensors")
    content = source.read_bytes()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(source)
    (tmp_path / "a.kohya.safetensors").symlink_to(source)
    ask = ("--new_rank", "2", "--model", source)
    for target, said in {
        ".safetensors": "the file has no name, only an ending",
        "b.ckpt": "must end with .safetensors: write",
        "v1.5.PT": f"must end with .safetensors: write {tmp_path / 'v1.5.safetensors'}",
        "new/": "names a folder: name the file in it",
        "folder.safetensors": "is a folder: name the file in it",
        "a.safetensors/b.safetensors": "is a file, not a folder",
        "a.safetensors": "is the input: choose another name, or allow overwriting it with --force",
        "link.safetensors": "is the input",
    }.items():
        assert said in _refusal(capsys, *ask, "--save_to", f"{tmp_path}/{target}"), target
    assert "--save_to: is missing" in _refusal(capsys, *ask)
    assert "--model: is missing" in _refusal(capsys, "--new_rank", "2", "--save_to", "b.safetensors")
    assert "no such file" in _refusal(capsys, "--new_rank", "2", "--model", tmp_path / "no", "--save_to", "b.safetensors")
    both = ("--quantize", "bits=4", "--format", "both", "--save_to", tmp_path / "a.safetensors", "--force")
    assert "--report" in _refusal(capsys, *ask, "--save_to", tmp_path / "b.safetensors", "--report", tmp_path / "page.pdf")
    (tmp_path / "other.safetensors").write_bytes(content)
    partner = ("--model", tmp_path / "a.kohya.safetensors", *both[:-2], tmp_path / "a.safetensors")
    assert "is the input" in _refusal(capsys, *partner)
    assert source.read_bytes() == content


def test_folders_that_cannot_be_written_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = lora_file(tmp_path / "a.safetensors")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)  # root may write everywhere
    target = locked / "new" / "b.safetensors"
    assert f"{locked} cannot be written" in _refusal(capsys, "--new_rank", "2", "--model", source, "--save_to", target)


def test_batches_are_checked_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora_file(tmp_path / "in" / "a.safetensors")
    ask = ("--new_rank", "2", "--model", tmp_path / "in")
    assert "name a folder" in _refusal(capsys, *ask)
    assert "is a file, and --model names many" in _refusal(capsys, *ask, "--save_to", tmp_path / "b.safetensors")
    assert "1 inputs would be overwritten" in _refusal(capsys, *ask, "--save_to", tmp_path / "in")
    assert "matches no" in _refusal(capsys, "--new_rank", "2", "--model", tmp_path / "*.x", "--save_to", tmp_path / "out")
    assert "--truncate 8MB: cuts one file" in _refusal(
        capsys, "--truncate", "8MB", "--model", tmp_path / "in", "--save_to", tmp_path / "out"
    )


def test_errors_are_json_too_where_json_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\xff" * 64)
    for words, status, code in (
        (["inspect", "--model", str(torn), "--json"], "refused", 1),
        (["inspect", "--json"], "wrong_usage", 2),
        (["--json"], "wrong_usage", 2),
    ):
        assert main(words) == code
        shown = capsys.readouterr()
        told = json.loads(shown.out)
        assert told["status"] == status and told["error"] in shown.err


def test_pairs_need_names_and_values() -> None:
    assert quantize_pairs(["bits=4", "strategy=nf4"]) == {"bits": "4", "strategy": "nf4"}
    assert quantize_pairs(None) == {}
    for word in ("bits", "=4", "bits="):
        with pytest.raises(UsageError, match="NAME=VALUE"):
            quantize_pairs([word])


def test_the_script_starts_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "resize_lora_ext.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--target_size" in done.stdout
    for verb in set(VERBS) - {"compress"}:
        assert f"resize_lora_ext.py {verb} " in done.stdout + " ", verb
    assert len((ROOT / "resize_lora_ext.py").read_text().splitlines()) < 50
