"""Flags that the training script does not have are refused with the one that was meant."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from lora_compress import SettingsError, setting_names
from lora_compress.cli.compress import _parser as resize_parser


def _refusal(monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    ext = importlib.import_module("train_network_ext")
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    with pytest.raises(SettingsError) as refused:
        ext.parse_arguments(list(argv), ext.HOSTS["sd"])
    return str(refused.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rank_ratio", "0.5"], "--rank_ratio: is a setting of [pruning]: write --pruning rank_ratio=0.5"),
        (["--target-size=20MB"], "write --pruning target_size=20MB"),
        (["--bits", "4"], "write --quantization bits=4"),
        (["--qat"], "write --quantization qat=..."),
        (["--format", "both"], "for a training write --quantization save_format=..."),
        (["--network-dim", "16"], "--network-dim: unknown flag, did you mean --network_dim?"),
        (["--quantizaton", "bits=4"], "--quantizaton: unknown flag, did you mean --quantization?"),
        (["stray"], "stray: belongs to no flag"),
    ],
)
def test_the_flag_that_was_meant_is_named(argv: list[str], said: str, sd_scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said in _refusal(monkeypatch, *argv)


def test_every_setting_given_as_a_flag_of_the_resize_script_is_told_its_section(
    sd_scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {action.dest: action.option_strings[-1] for action in resize_parser()._actions if action.dest in setting_names()}
    assert len(flags) > 10
    for name, flag in flags.items():
        if name != "quantization_device":  # a flag of both
            assert f"{name}=" in _refusal(monkeypatch, flag, "1"), flag


def test_quantize_is_taken_for_quantization(sd_scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ext = importlib.import_module("train_network_ext")
    found = []
    for flag in ("--quantize", "--quantization"):
        argv = ["--network_module=networks.lora_compress", flag, "bits=4", "strategy=nf4"]
        monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
        found.append(ext.parse_arguments(argv, ext.HOSTS["sd"]).network_args)
    assert found[0] == found[1] == ["bits=4", "strategy=nf4"]
