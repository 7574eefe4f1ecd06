"""Settings: the table of bits and strategies, and every problem told at once in words that name the remedy."""

from __future__ import annotations

import re

import pytest
import torch

from lora_compress import CompressionSettings, PruningSettings, QuantizationSettings, SettingsError, setting_names, split_settings
from lora_compress.quantization import CODECS
from lora_compress.settings import bits_table

WHOLE = {2, 3, 4, 5, 6, 8}
ALLOWED: dict[str, set[float]] = {
    "dynamic": WHOLE | {16},
    "static": WHOLE | {16},
    "nf4": {4},
    "mixed": WHOLE | {7, 2.5, 4.5},
    "entropy": WHOLE | {7, 1, 0.01, 2.5, 4.5},
}
GROUPS = {
    "dynamic": {16, 32, 64, 128, 256, 512, 1024},
    "mixed": {16, 32, 64, 128, 256, 512, 1024},
    "nf4": {32, 64, 128, 256},
    "static": set(),
    "entropy": set(),
}


def problems_of(values: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        CompressionSettings.parse(values)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize("strategy", [*ALLOWED, "other"])
@pytest.mark.parametrize(
    "bits", [-4, 0, 0.01, 1, 2, 2.5, 3, 4, 4.5, 5, 6, 7, 8, 8.5, 9, 15, 16, 17, 32, float("inf"), float("nan")]
)
def test_bits_and_strategy_follow_the_table(strategy: str, bits: float) -> None:
    values = {"strategy": strategy, "bits": bits}
    if bits in ALLOWED.get(strategy, set()):
        quantization = CompressionSettings.parse(values).quantization
        assert quantization.enabled == (bits < 16)
        if quantization.enabled and quantization.codec_name in CODECS:
            assert quantization.codec_name == strategy or CODECS[quantization.codec_name].bits == bits
        elif quantization.enabled:
            assert quantization.codec_name == strategy
    else:
        (problem,) = problems_of(values)
        if strategy == "other":
            assert "dynamic, static, nf4, mixed, entropy" in problem
        else:
            assert problem == f"bits={bits:g} with strategy={strategy}: allowed are {bits_table()}"


def test_the_table_names_every_strategy() -> None:
    for strategy in ALLOWED:
        assert f"{strategy}: " in bits_table()


@pytest.mark.parametrize("strategy", ["mixed", "entropy"])
@pytest.mark.parametrize("target", [{"target_size": "20MB"}, {"target_error": 0.05}])
def test_bits_or_a_target_decide_about_the_average(strategy: str, target: dict[str, object]) -> None:
    settings = CompressionSettings.parse({"strategy": strategy} | target)
    assert settings.enabled
    assert settings.quantization.enabled
    assert settings.save_format == "packed"
    (neither,) = problems_of({"strategy": strategy})
    assert re.search(f"bits=none with strategy={strategy} and no target: give bits, target_size or target_error", neither)
    (both,) = problems_of({"strategy": strategy, "bits": 3} | target)
    assert re.search(f"bits=3 with strategy={strategy} and a target: give the one or the other", both)
    CompressionSettings.parse({"bits": 4} | target)  # of the others, rank alone is then free


@pytest.mark.parametrize("strategy", ALLOWED)
def test_progressive_and_refine_belong_to_entropy(strategy: str) -> None:
    values = {"strategy": strategy, "bits": 4}
    assert CompressionSettings.parse(values).quantization.refine
    for name, value in (("progressive", True), ("refine", False)):
        if strategy == "entropy":
            assert getattr(CompressionSettings.parse(values | {name: value}).quantization, name) is value
        else:
            (problem,) = problems_of(values | {name: value})
            assert problem.startswith(f"{name}={str(value).lower()} is only possible with strategy=entropy")


@pytest.mark.parametrize("strategy", GROUPS)
@pytest.mark.parametrize("size", [-64, 0, 1, 8, 16, 32, 48, 64, 128, 256, 512, 1024, 2048])
def test_group_sizes_follow_the_strategy(strategy: str, size: int) -> None:
    values = {"strategy": strategy, "bits": 4, "group_size": size}
    if size in GROUPS[strategy]:
        assert CompressionSettings.parse(values).quantization.block_size == size
    else:
        (problem,) = problems_of(values)
        assert "group_size" in problem
        assert "remove it" in problem if strategy in ("static", "entropy") else str(sorted(GROUPS[strategy])[0]) in problem


def test_defaults() -> None:
    settings = CompressionSettings.parse({})
    assert settings == CompressionSettings()
    assert not settings.enabled
    assert settings.save_format == "kohya"
    assert settings.pruning == PruningSettings(rank_ratio=1.0, norm_threshold=0.0, min_rank=None)
    assert settings.as_dict()["min_rank"] == settings.pruning.rank_floor == 4
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
    "nf4 without bits": ({"strategy": "nf4"}, ["bits=none with strategy=nf4: allowed"]),
    "static without bits": ({"strategy": "static"}, ["bits=none with strategy=static: allowed"]),
    "entropy in groups": (
        {"strategy": "entropy", "bits": 3, "group_size": 64},
        ["group_size.*one step.*remove"],
    ),
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
    "very unknown key": ({"xyzzy": 1}, ["xyzzy: unknown setting; known are allow_larger, bits, .*strategy"]),
    "nothing to prune": (
        {"iterative_pruning": True, "min_rank": 1},
        ["iterative_pruning=true has nothing to remove: set rank_ratio"],
    ),
    "no iterations": ({"max_iterations": 0}, ["max_iterations=0: must be 1 or more"]),
    "end before start": ({"pruning_start": 0.7}, ["pruning_end=0.5: must lie after pruning_start=0.7"]),
    "shares": ({"pruning_start": -0.1, "pruning_end": 1.5}, [r"pruning_start=-0.1.*\[0, 1\)", r"pruning_end=1.5.*\(0, 1\]"]),
    "schedule": ({"pruning_schedule": "step"}, ["pruning_schedule=step: must be one of cubic, linear"]),
    "importance": (
        {"importance": "taylor"},
        ["importance=taylor: must be one of magnitude, sensitivity, activation", "importance=taylor is only used by iterative"],
    ),
    "threshold of another unit": (
        {"iterative_pruning": True, "norm_threshold": 0.1, "importance": "sensitivity"},
        ["norm_threshold=0.1 with importance=sensitivity: it is a singular value"],
    ),
    "return without pruning": ({"rank_return": True}, ["rank_return=true is only used by iterative_pruning"]),
    "qat without bits": ({"qat": True}, ["qat=true.*set bits under 16"]),
    "qat mixed": ({"qat": True, "bits": 4, "strategy": "mixed"}, ["qat=true with strategy=mixed.*use dynamic"]),
    "qat to a size": ({"qat": True, "bits": 4, "target_size": "2MB"}, ["qat=true and a target contradict"]),
    "qat without channels": ({"qat": True, "bits": 4, "channel_threshold": 0.1}, ["qat=true and channel_threshold"]),
    "qat pruned at saving": (
        {"qat": True, "bits": 4, "rank_ratio": 0.5},
        ["qat=true removes no component.*iterative_pruning=true"],
    ),
    "qat in layers": ({"qat": True, "bits": 3, "strategy": "entropy", "progressive": True}, ["qat=true and progressive=true"]),
    "qat_start": ({"qat_start": 1}, [r"qat_start=1: must lie in \[0, 1\)"]),
    "qat_refresh": ({"qat_refresh": 0}, ["qat_refresh=0: must be 1 or more"]),
    "several": (
        {"rank_ratio": 2, "min_rank": "many", "bits": 7, "save_format": "zip", "strateggy": "nf4"},
        [
            "strateggy.*did you mean strategy",
            "min_rank='many': must be a whole number",
            "rank_ratio=2",
            "bits=7",
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
    assert problems_of({"bits": "four", "strategy": "nf4"}) == ("bits='four': must be a number",)


@pytest.mark.parametrize("name", setting_names())
@pytest.mark.parametrize("value", [True, None, [4], {"a": 1}, "", "four", 1j], ids=lambda value: str(value)[:12])
def test_values_of_a_wrong_type_are_refused_by_name(name: str, value: object) -> None:
    if value is True and setting_names()[name] is bool:
        value = 1
    problems = problems_of({name: value})
    assert any(problem.startswith(f"{name}=") for problem in problems)


def test_what_happens_in_training_survives_a_round_trip_and_is_told_only_where_it_is_on() -> None:
    given = {"iterative_pruning": True, "rank_ratio": 0.5, "min_rank": 2, "max_iterations": 4, "importance": "sensitivity"}
    given |= {"qat": True, "bits": 4, "group_size": 32}
    settings = CompressionSettings.parse(given)
    told = {name: value for name, value in settings.as_dict().items() if value is not None}
    assert CompressionSettings.parse(told) == settings
    assert settings.acts_in_training
    off = CompressionSettings.parse({"rank_ratio": 0.5, "max_iterations": 4, "qat_refresh": 7, "bits": 4})
    assert not off.acts_in_training
    assert off.as_dict()["max_iterations"] is None and off.as_dict()["qat_refresh"] is None


@pytest.mark.parametrize("name", ["min_rank", "group_size"])
@pytest.mark.parametrize("value", [4.0, 4.5, "4.0", "4.5", "0x4", float("nan")])
def test_whole_numbers_are_whole(name: str, value: object) -> None:
    assert f"{name}={value!r}: must be a whole number" in problems_of({name: value})


def test_split_settings_parts_ours_from_the_hosts() -> None:
    settings, host = split_settings({"bits": "4", "conv_dim": "8", "rank_ratio": "0.5"}, {"conv_dim", "dropout"})
    assert host == {"conv_dim": "8"}
    assert settings == CompressionSettings.parse({"bits": 4, "rank_ratio": 0.5})


def test_split_settings_tells_strangers_and_bad_values_in_one_error() -> None:
    with pytest.raises(SettingsError) as caught:
        split_settings({"bits": "7", "conv_dims": "8", "rank_ratioo": "0.5"}, {"conv_dim", "dropout"})
    assert str(caught.value).startswith("compression settings: ")
    assert len(caught.value.problems) == 3
    assert re.search("conv_dims.*did you mean conv_dim[^s]?", caught.value.problems[0])
    assert "did you mean rank_ratio" in caught.value.problems[1]
    assert "bits=7" in caught.value.problems[2]


@pytest.mark.parametrize("part", [PruningSettings(rank_ratio=2.0), QuantizationSettings(bits=7)])
def test_parts_built_by_hand_are_checked_too(part: PruningSettings | QuantizationSettings) -> None:
    name = "pruning" if isinstance(part, PruningSettings) else "quantization"
    with pytest.raises(SettingsError):
        CompressionSettings(**{name: part})  # type: ignore[arg-type]
