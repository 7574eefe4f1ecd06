"""What pruning and budget settings refuse, and in which words."""

from __future__ import annotations

import re

import pytest

from lora_compress import CompressionSettings, PruningSettings, SettingsError
from lora_compress.settings import BudgetSettings

REFUSED = {
    "new_rank 0": ({"new_rank": 0}, ["new_rank=0: must be 1 or more"]),
    "new_conv_rank -1": ({"new_conv_rank": -1}, ["new_conv_rank=-1: must be 1 or more"]),
    "floor above cap": (
        {"new_rank": 2, "min_rank": 3},
        ["new_rank=2 and min_rank=3 contradict each other: make min_rank 2 or less"],
    ),
    "floor above conv cap": ({"new_rank": 9, "new_conv_rank": 2, "min_rank": 3}, ["new_conv_rank=2 and min_rank=3"]),
    "unknown method": ({"dynamic_method": "svd", "dynamic_param": 1}, ["dynamic_method=svd: must be one of sv_ratio, .*knee"]),
    "param alone": ({"dynamic_param": 0.5}, ["dynamic_param=0.5: no dynamic_method uses it"]),
    "no param": ({"dynamic_method": "sv_fro"}, [r"dynamic_param=None: is missing.*sv_fro.*\(0, 1\]"]),
    "ratio under 1": ({"dynamic_method": "sv_ratio", "dynamic_param": 0.5}, ["dynamic_param=0.5:.*1 or more"]),
    "ratio inf": ({"dynamic_method": "sv_ratio", "dynamic_param": "inf"}, ["dynamic_param=inf"]),
    "share above 1": ({"dynamic_method": "energy", "dynamic_param": 1.5}, [r"dynamic_param=1.5:.*\(0, 1\]"]),
    "share 0": ({"dynamic_method": "sv_cumulative", "dynamic_param": 0}, ["dynamic_param=0:"]),
    "share nan": ({"dynamic_method": "sv_fro", "dynamic_param": "nan"}, ["dynamic_param=nan"]),
    "knee below 0": ({"dynamic_method": "knee", "dynamic_param": -1}, ["dynamic_param=-1"]),
    "param that does not parse": ({"dynamic_method": "sv_fro", "dynamic_param": "x"}, ["dynamic_param='x': must be a number"]),
    "two criteria": ({"dynamic_method": "knee", "rank_ratio": 0.5}, ["dynamic_method=knee and rank_ratio=0.5.*give one"]),
    "layer share 1": ({"layer_threshold": 1}, [r"layer_threshold=1: must lie in \[0, 1\)"]),
    "channel share nan": ({"channel_threshold": "nan"}, ["channel_threshold=nan"]),
}


@pytest.mark.parametrize(("values", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_contradictions_are_refused(values: dict[str, object], expected: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        CompressionSettings.parse(values)
    assert len(caught.value.problems) == len(expected)
    for problem, pattern in zip(caught.value.problems, expected, strict=True):
        assert re.search(pattern, problem), problem


@pytest.mark.parametrize(
    "values",
    [
        {"new_rank": 4},
        {"new_conv_rank": 4},
        {"new_rank": 2, "new_conv_rank": 1, "rank_ratio": 0.5, "norm_threshold": 0.1},
        {"dynamic_method": "knee"},
        {"dynamic_method": "sv_ratio", "dynamic_param": 1, "new_rank": 8, "min_rank": 8},
        {"layer_threshold": 0.01},
        {"channel_threshold": 0.01},
    ],
)
def test_every_criterion_enables_pruning(values: dict[str, object]) -> None:
    assert CompressionSettings.parse(values).pruning.enabled
    assert not PruningSettings(min_rank=2).enabled


def test_targets_of_parts() -> None:
    budget = BudgetSettings(target_error_unet=0.05, target_error_text_encoder=0.02)
    assert [budget.part_error(part) for part in ("U-Net", "DiT", "text encoder", "text encoder 2")] == [0.05, 0.05, 0.02, 0.02]
    assert BudgetSettings(target_error=0.1).part_error("U-Net") is None
