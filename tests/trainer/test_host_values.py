"""Every option of every trainer of sd-scripts, given every kind of value that people and their tools write in a TOML file.

sd-scripts itself is the reference: its own reading of the file, and for texts what its command line makes of them.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import toml

from lora_compress import SettingsError
from lora_compress.settings import is_same_value

KINDS = ["sd", "sdxl", "sd3", "flux", "lumina", "hunyuan_image", "anima"]  # Chroma's trainer is that of FLUX
UNSET, REFUSED, ITSELF = "the default", "refused", "as it stands"
# What a value of a TOML file means, by the kind of the option: flag, whole number, number, text. A text may have two meanings,
# since an empty text is a text for some options and not set for others.
MEANINGS: list[tuple[Any, Any, Any, Any, tuple[Any, ...]]] = [
    (True, True, REFUSED, REFUSED, (REFUSED,)),
    (False, False, (0, UNSET), (0, UNSET), (UNSET,)),
    (0, False, (0, UNSET), 0, ("0", UNSET)),
    (0.0, False, (0, 0.0, UNSET), 0.0, ("0", "0.0", UNSET)),
    (1, True, 1, 1, ("1",)),
    (3, True, 3, 3, ("3",)),
    (0.1, True, (REFUSED, 0.1), 0.1, ("0.1",)),
    (1.0, True, (1, 1.0), 1.0, ("1.0", "1")),
    (1.5, True, (REFUSED, 1.5), 1.5, ("1.5",)),
    (100.0, True, (100, 100.0), 100.0, ("100.0", "100")),
    (float("nan"), REFUSED, REFUSED, REFUSED, (REFUSED,)),
    ("", False, UNSET, UNSET, ("", UNSET)),
    ("no", False, REFUSED, REFUSED, (ITSELF,)),
    ("NO", False, REFUSED, REFUSED, (ITSELF,)),
    ("true", True, REFUSED, REFUSED, (ITSELF,)),
    ("false", False, REFUSED, REFUSED, (ITSELF,)),
    ("0", False, (0, UNSET), 0.0, (ITSELF,)),
    ("1", True, 1, 1.0, (ITSELF,)),
    ("10", REFUSED, 10, 10.0, (ITSELF,)),
    ("1.0", REFUSED, (1, 1.0), 1.0, (ITSELF,)),
    ("0.5", REFUSED, (REFUSED, 0.5), 0.5, (ITSELF,)),
    ("1e-4", REFUSED, (REFUSED, 1e-4), 1e-4, (ITSELF,)),
    ("None", False, UNSET, UNSET, (ITSELF, UNSET)),
    ("null", False, UNSET, UNSET, (ITSELF, UNSET)),
    ("undefined", False, UNSET, UNSET, (ITSELF, UNSET)),
    ("some text", REFUSED, REFUSED, REFUSED, (ITSELF,)),
    ([], False, UNSET, UNSET, (UNSET,)),
    ([1], True, 1, 1, ("1",)),
    ([512, 768], REFUSED, REFUSED, REFUSED, (REFUSED, "512,768")),
]
LITERALS = {  # values of optimizer_args, which sd-scripts evaluates as Python, and what it gets
    "weight_decay=0.01": "weight_decay=0.01",
    "betas=0.9, 0.99": "betas=0.9, 0.99",
    "betas=(0.9,0.99)": "betas=(0.9,0.99)",
    "decouple=true": "decouple=True",
    "decouple=True": "decouple=True",
    "d0=None": "d0=None",
    "mode=min": "mode='min'",
    "mode='min'": "mode='min'",
}
LISTS: list[tuple[Any, Any, Any]] = [  # likewise: a list of texts, a list of numbers
    (True, REFUSED, REFUSED),
    (False, UNSET, (UNSET, False)),
    (1e-5, REFUSED, ([1e-5], 1e-5)),
    ("", "", UNSET),
    ("None", UNSET, UNSET),
    ("a=1", ["a=1"], REFUSED),
    ("a=1 b=2,3", (["a=1", "b=2,3"], ["a=1 b=2,3"]), REFUSED),
    ("betas=0.9, 0.99 decay = 1", (["betas=0.9, 0.99", "decay=1"], ["betas=0.9, 0.99 decay = 1"]), REFUSED),
    ('"a=1" "b=2"', (["a=1", "b=2"], ['"a=1" "b=2"']), REFUSED),
    ("['a=1', 'b=2']", ["a=1", "b=2"], REFUSED),
    ("some text", (["some text"], REFUSED), REFUSED),
    ("1e-5 2e-5", (["1e-5 2e-5"], REFUSED), [1e-5, 2e-5]),
    ("1e-5,2e-5", (["1e-5,2e-5"], REFUSED), [1e-5, 2e-5]),
    ([], [], []),
    ([""], [], REFUSED),
    (["a=1", "b=2=3"], (["a=1", "b=2=3"], REFUSED), REFUSED),
    (["a=1 b=2"], (["a=1", "b=2"], ["a=1 b=2"]), REFUSED),
    ([1.0, 2e-5], REFUSED, [1.0, 2e-5]),
    (["1e-5", "1"], (["1e-5", "1"], REFUSED), [1e-5, 1.0]),
    ([False], REFUSED, [0]),
    ({"a": 1}, REFUSED, REFUSED),
]


VALUES = [row[0] for row in MEANINGS] + [
    row[0] for row in LISTS if not isinstance(row[0], dict) and not any(is_same_value(row[0], other[0]) for other in MEANINGS)
]


@pytest.fixture
def ext(sd_scripts: Path) -> ModuleType:
    return importlib.import_module("train_network_ext")


@functools.cache
def actions_of(script: str) -> dict[str, argparse.Action]:
    """The options of a trainer, without those that the launcher decides on and those that are just the same for SD."""
    parser = importlib.import_module(script).setup_parser()
    without = {"help", "config_file", "output_config", "model_type", "attn_mode"}
    actions = {action.dest: action for action in parser._actions if action.dest not in without}
    if script == "train_network":
        return actions
    common = actions_of("train_network")
    return {name: action for name, action in actions.items() if name not in common or kind_of(action) != kind_of(common[name])}


def kind_of(action: argparse.Action) -> tuple[Any, ...]:
    return action.type, action.nargs, action.default, action.choices, action.const


def read(ext: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, path: Path) -> argparse.Namespace:
    argv = ["--config_file", str(path)]
    monkeypatch.setattr(sys, "argv", ["train_network_ext.py", *argv])
    return ext.parse_arguments(argv, ext.HOSTS[kind])


def read_as_sd_scripts(ext: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, path: Path) -> argparse.Namespace:
    parser = importlib.import_module(ext.HOSTS[kind].script).setup_parser()
    argv = ["--config_file", str(path)]
    monkeypatch.setattr(sys, "argv", ["train_network.py", *argv])
    util = importlib.import_module("library.train_util")
    return util.read_config_from_file(parser.parse_args(argv), parser)


def row_of(action: argparse.Action, value: Any) -> tuple[Any, ...]:
    """The row of the table for the kind of option; empty where it has none."""
    rows = LISTS if action.nargs == "*" else MEANINGS
    return next((row for row in rows if row[0] is value or is_same_value(row[0], value)), ())


def meanings_of(action: argparse.Action, value: Any) -> list[Any]:
    """What `value` may be read as for an option; REFUSED is among them where there may be nothing."""
    row = row_of(action, value)
    if action.nargs == "*":
        found = row[1] if action.type is str else row[2]
    else:
        found = row[1] if action.nargs == 0 else row[2] if action.type is int else row[3] if action.type is float else row[4]
    alternatives = list(found) if isinstance(found, tuple) else [found]
    if action.dest in ("lr_warmup_steps", "lr_decay_steps"):
        alternatives = list(row[2]) if isinstance(row[2], tuple) else [row[2]]
    if action.choices and action.type is not int:
        words = {choice.lower(): choice for choice in action.choices if choice is not None}
        alternatives = [words[str(value).lower()]] if str(value).lower() in words else [REFUSED, UNSET]
        alternatives += {"": ["", "no"], False: ["no"]}.get(value, []) if not isinstance(value, list) else []
        if action.dest in ("dynamo_backend", "sample_sampler"):  # which sd-scripts does not check against its choices
            alternatives += [value, "no"]
    if action.dest == "lr_scheduler" and isinstance(value, str):
        alternatives += [value.lower()]  # the names of all schedulers are in small letters
    return [value if found is ITSELF else action.default if found is UNSET else found for found in alternatives]


def write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(toml.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_read_as_sd_scripts_reads_it_or_in_its_one_meaning(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, value: Any
) -> None:
    actions = {name: action for name, action in actions_of(ext.HOSTS[kind].script).items() if row_of(action, value)}
    path, config = tmp_path / "config.toml", dict.fromkeys(actions, value)
    try:
        args = read(ext, monkeypatch, kind, write(path, config))
    except SettingsError as error:
        refused = {re.match(r"\w+", problem)[0] for problem in error.problems}
        assert refused <= actions.keys(), error
        for name in refused:
            assert REFUSED in meanings_of(actions[name], value), f"{name} = {value!r} is refused"
        config = dict.fromkeys(actions.keys() - refused, value)
        caplog.clear()
        args = read(ext, monkeypatch, kind, write(path, config))
    theirs = vars(read_as_sd_scripts(ext, monkeypatch, kind, path))
    for name in config:
        result, allowed = getattr(args, name), meanings_of(actions[name], value)
        assert any(is_same_value(result, meaning) for meaning in allowed), f"{name} = {value!r} is read as {result!r}"
        assert is_same_value(result, theirs[name]) or f"{name} = " in caplog.text or f"{name} is converted" in caplog.text


def test_arguments_of_an_optimizer_are_what_sd_scripts_can_evaluate(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("optimizer_args", "lr_scheduler_args"):
        args = read(ext, monkeypatch, "sd", write(tmp_path / "config.toml", {name: list(LITERALS)}))
        assert getattr(args, name) == list(LITERALS.values())
        for pair in getattr(args, name):
            ast.literal_eval(pair.partition("=")[2])  # as sd-scripts does
        with pytest.raises(SettingsError, match="weight_decay has no value"):
            read(ext, monkeypatch, "sd", write(tmp_path / "config.toml", {name: ["weight_decay="]}))


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("lr_scheduler", " Cosine", "cosine"),
        ("optimizer_type", "AdamW ", "AdamW"),
        ("dynamo_backend", "no", "no"),
        ("dynamo_backend", "NO", "NO"),
        ("save_precision", "fp32", "float"),
        ("sample_sampler", "unipc", "unipc"),
        ("caption_separator", " ", " "),
        ("caption_prefix", "none", "none"),
        ("vae", " ", None),
        ("output_name", 1.0, "1.0"),
        ("output_name", "None", "None"),
        ("lr_scheduler_num_cycles", 0.5, 0.5),
        ("lr_warmup_steps", 0.1, 0.1),
        ("lr_warmup_steps", 100.0, 100),
        ("lr_warmup_steps", "5%", 0.05),
        ("save_every_n_epochs", 0, None),
        ("save_last_n_steps", "0", None),
        ("keep_tokens", 0, 0),
        ("max_token_length", 75, 75),
        ("resolution", [512.0, 768.0], "512,768"),
        ("resolution", "512x768", "512,768"),
        ("seed", -1, None),
        ("xformers", "xformers", True),
        ("text_encoder_lr", 1e-5, 1e-5),
        ("optimizer_args", "weight_decay=0.1,betas=0.9,0.99", ["weight_decay=0.1", "betas=0.9,0.99"]),
        ("network_args", "conv_dim=4, conv_alpha=1", ["conv_dim=4", "conv_alpha=1"]),
        ("network_args", ["network_reg_dims=single=4,double=8"], ["network_reg_dims=single=4,double=8"]),
        ("base_weights", "a b.safetensors", ["a b.safetensors"]),
        ("base_weights", "one.safetensors\ntwo.safetensors\n", ["one.safetensors", "two.safetensors"]),
    ],
)
def test_what_options_mean_of_their_own(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: Any, meant: Any
) -> None:
    args = read(ext, monkeypatch, "sd", write(tmp_path / "config.toml", {name: value}))
    assert is_same_value(getattr(args, name), meant)


@pytest.mark.parametrize("name", ["wandb_api_key", "huggingface_token"])
def test_secrets_are_not_shown(
    ext: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    args = read(ext, monkeypatch, "sd", write(tmp_path / "config.toml", {name: 271828}))
    assert getattr(args, name) == "271828" and f"{name} is converted" in caplog.text and "271828" not in caplog.text
    with pytest.raises(SettingsError, match="not shown") as caught:
        read(ext, monkeypatch, "sd", write(tmp_path / "config.toml", {name: [271828, 314159]}))
    assert "314159" not in str(caught.value)
