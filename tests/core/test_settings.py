"""Settings: the table of bits and strategies, and every problem told at once in words that name the remedy."""

from __future__ import annotations

import re

import pytest
import torch

from lora_compress import CompressionSettings, PruningSettings, QuantizationSettings, SettingsError, setting_names, split_settings
from lora_compress.quantization import CODECS

ALLOWED = {("dynamic", 4), ("dynamic", 8), ("static", 4), ("static", 8), ("nf4", 4), ("dynamic", 16), ("static", 16)}
GROUPS = {"dynamic": {16, 32, 64, 128, 256, 512, 1024}, "nf4": {32, 64, 128, 256}, "static": set()}


def problems_of(values: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        CompressionSettings.parse(values)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize("strategy", ["dynamic", "static", "nf4", "other"])
@pytest.mark.parametrize("bits", [-4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 32])
def test_bits_and_strategy_follow_the_table(strategy: str, bits: int) -> None:
    values = {"strategy": strategy, "bits": bits}
    if (strategy, bits) in ALLOWED:
        quantization = CompressionSettings.parse(values).quantization
        assert quantization.enabled == (bits < 16)
        if quantization.enabled:
            assert CODECS[quantization.codec_name].bits == bits
    else:
        (problem,) = problems_of(values)
        if strategy == "other":
            assert "dynamic, static, nf4" in problem
        else:
            assert re.search(rf"bits={bits} with strategy={strategy}.*dynamic: 4, 8.*nf4: 4.*16", problem)


@pytest.mark.parametrize("strategy", GROUPS)
@pytest.mark.parametrize("size", [-64, 0, 1, 8, 16, 32, 48, 64, 128, 256, 512, 1024, 2048])
def test_group_sizes_follow_the_strategy(strategy: str, size: int) -> None:
    values = {"strategy": strategy, "bits": 4, "group_size": size}
    if size in GROUPS[strategy]:
        assert CompressionSettings.parse(values).quantization.block_size == size
    else:
        (problem,) = problems_of(values)
        assert "group_size" in problem
        assert "remove it" in problem if strategy == "static" else str(sorted(GROUPS[strategy])[0]) in problem


def test_defaults() -> None:
    settings = CompressionSettings.parse({})
    assert settings == CompressionSettings()
    assert not settings.enabled
    assert settings.save_format == "kohya"
    assert settings.pruning == PruningSettings(rank_ratio=1.0, norm_threshold=0.0, min_rank=4)
    assert CompressionSettings.parse({"bits": 4}).quantization.block_size == 64
    static = CompressionSettings.parse({"bits": 8, "strategy": "static"}).quantization
    assert static.block_size is None
    assert static.static_scale == 0.0625
    assert CompressionSettings.parse({"bits": 8}).quantization.static_scale is None


@pytest.mark.parametrize(
    ("values", "save_format"),
    [({}, "kohya"), ({"bits": 4}, "packed"), ({"bits": 4, "save_format": "kohya"}, "kohya"), ({"save_format": "fp8"}, "fp8")],
)
def test_save_format_follows_bits_unless_given(values: dict[str, object], save_format: str) -> None:
    settings = CompressionSettings.parse(values)
    assert settings.save_format == save_format
    assert settings.enabled == bool(values)


CONTRADICTIONS = {
    "packed without bits": ({"save_format": "packed"}, ["save_format=packed.*set bits under 16, or save_format=kohya"]),
    "both without bits": ({"save_format": "both"}, ["save_format=both.*set bits"]),
    "fp8 with bits": ({"save_format": "fp8", "bits": 8}, ["save_format=fp8.*bits=16, or save_format=packed"]),
    "nf4 without bits": ({"strategy": "nf4"}, ["bits=16 with strategy=nf4"]),
    "scale without static": ({"bits": 4, "scale": 0.1}, ["scale is only used by strategy=static.*remove it"]),
    "unknown format": ({"save_format": "gguf"}, ["save_format=gguf: must be one of kohya, fp8, packed, both"]),
    "ratio 0": ({"rank_ratio": 0}, [r"rank_ratio=0: must lie in \(0, 1\]"]),
    "ratio above 1": ({"rank_ratio": 1.01}, ["rank_ratio=1.01"]),
    "ratio beyond floats": ({"rank_ratio": 10**400}, ["rank_ratio=1000.*: must be a number"]),
    "ratio nan": ({"rank_ratio": "nan"}, ["rank_ratio=nan"]),
    "threshold inf": ({"norm_threshold": float("inf")}, ["norm_threshold=inf"]),
    "threshold nan": ({"norm_threshold": "NaN"}, ["norm_threshold=nan"]),
    "threshold negative": ({"norm_threshold": -1}, ["norm_threshold=-1: must be 0 or more"]),
    "min_rank negative": ({"min_rank": -1}, ["min_rank=-1"]),
    "scale 0": ({"bits": 8, "strategy": "static", "scale": 0}, ["scale=0: must be above 0"]),
    "scale nan": ({"bits": 8, "strategy": "static", "scale": "nan"}, ["scale=nan"]),
    "scale inf": ({"bits": 8, "strategy": "static", "scale": "inf"}, ["scale=inf"]),
    "device": ({"quantization_device": "gpu"}, ["quantization_device=gpu: must be cpu, cuda or cuda:<number>"]),
    "unknown key": ({"rank_ration": 0.5}, ["rank_ration: unknown setting, did you mean rank_ratio"]),
    "very unknown key": ({"xyzzy": 1}, ["xyzzy: unknown setting; known are bits, .*strategy"]),
    "not yet": ({"iterative_pruning": True}, ["iterative_pruning: pruning during training is not part.*remove it"]),
    "not yet either": ({"max_iterations": 10}, ["max_iterations: .*remove it"]),
    "several": (
        {"rank_ratio": 2, "min_rank": "many", "bits": 3, "save_format": "zip", "strateggy": "nf4"},
        [
            "strateggy.*did you mean strategy",
            "min_rank='many': must be a whole number",
            "rank_ratio=2",
            "bits=3",
            "save_format=zip",
        ],
    ),
}


@pytest.mark.parametrize(("values", "expected"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_every_problem_is_told_at_once(values: dict[str, object], expected: list[str]) -> None:
    problems = problems_of(values)
    assert len(problems) == len(expected)
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.search(pattern, problem)


FULL = {
    "rank_ratio": 0.5,
    "norm_threshold": 0.001,
    "min_rank": 2,
    "bits": 8,
    "strategy": "static",
    "scale": 0.125,
    "save_format": "both",
    "quantization_device": "cuda:1",
}


def test_text_means_what_toml_values_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    from_text = CompressionSettings.parse({name: f" {value} ".upper() for name, value in FULL.items()})
    assert from_text == CompressionSettings.parse(FULL)
    told = from_text.as_dict()
    assert {name: told[name] for name in FULL} == FULL
    assert told.keys() == setting_names().keys()
    assert CompressionSettings.parse({name: value for name, value in told.items() if value is not None}) == from_text


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert problems_of({"quantization_device": "cuda"}) == ("quantization_device=cuda: torch finds no CUDA device here: use cpu",)


def test_a_value_that_does_not_parse_brings_no_second_complaint() -> None:
    assert problems_of({"bits": "four", "strategy": "nf4"}) == ("bits='four': must be a whole number",)


@pytest.mark.parametrize("name", setting_names())
@pytest.mark.parametrize("value", [True, None, [4], {"a": 1}, "", "four", 1j], ids=lambda value: str(value)[:12])
def test_values_of_a_wrong_type_are_refused_by_name(name: str, value: object) -> None:
    problems = problems_of({name: value})
    assert any(problem.startswith(f"{name}=") for problem in problems)


@pytest.mark.parametrize("name", ["bits", "min_rank", "group_size"])
@pytest.mark.parametrize("value", [4.0, 4.5, "4.0", "4.5", "0x4", float("nan")])
def test_whole_numbers_are_whole(name: str, value: object) -> None:
    assert f"{name}={value!r}: must be a whole number" in problems_of({name: value})


def test_split_settings_parts_ours_from_the_hosts() -> None:
    settings, host = split_settings({"bits": "4", "conv_dim": "8", "rank_ratio": "0.5"}, {"conv_dim", "dropout"})
    assert host == {"conv_dim": "8"}
    assert settings == CompressionSettings.parse({"bits": 4, "rank_ratio": 0.5})


def test_split_settings_tells_strangers_and_bad_values_in_one_error() -> None:
    with pytest.raises(SettingsError) as caught:
        split_settings({"bits": "5", "conv_dims": "8", "rank_ratioo": "0.5"}, {"conv_dim", "dropout"})
    assert str(caught.value).startswith("compression settings: ")
    assert len(caught.value.problems) == 3
    assert re.search("conv_dims.*did you mean conv_dim[^s]?", caught.value.problems[0])
    assert "did you mean rank_ratio" in caught.value.problems[1]
    assert "bits=5" in caught.value.problems[2]


@pytest.mark.parametrize("part", [PruningSettings(rank_ratio=2.0), QuantizationSettings(bits=3)])
def test_parts_built_by_hand_are_checked_too(part: PruningSettings | QuantizationSettings) -> None:
    name = "pruning" if isinstance(part, PruningSettings) else "quantization"
    with pytest.raises(SettingsError):
        CompressionSettings(**{name: part})  # type: ignore[arg-type]
