"""What is said at the start of a training about the number of pictures that its controller needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_compress import AdaptiveSettings
from lora_compress.evaluation.extractors import load_extractor
from lora_compress.evaluation.validation import Validation
from lora_compress.settings import EvaluationSettings
from lora_compress.training.evaluator import Evaluator
from lora_compress.training.evidence import expected_slope_reach, pictures_warning


def validation(count: int, reference: int = 48) -> Validation:
    """Held-out pictures whose features have a falling spectrum, as those of real extractors have."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(reference, 128, generator=random) / torch.arange(1, 129).sqrt()
    settings = EvaluationSettings.parse({"extractor": "probe", "count": count, "size": 64})
    return Validation(settings, ("a prompt",) * count, load_extractor("probe"), features)


def adaptive(**values: Any) -> AdaptiveSettings:
    return AdaptiveSettings.parse({"mode": "fid_trend", "metric": "probe_fd", **values})


def test_more_pictures_are_asked_for_by_a_number_that_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few, settings = validation(4), adaptive(compress_slope=0.1)
    warning = pictures_warning(few, settings)
    assert warning is not None and "with 4 pictures" in warning
    named = int(warning.split("count=")[1].split(" ")[0])
    assert expected_slope_reach(few, settings, named) < 0.1 <= expected_slope_reach(few, settings, 4)
    assert pictures_warning(validation(named), settings) is None
    with caplog.at_level(logging.WARNING):
        Evaluator(few, tmp_path / "x", {"mode": "fid_trend", "compress_slope": 0.1})
    assert warning in caplog.text


def test_where_no_number_is_enough_something_else_is_named() -> None:
    warning = pictures_warning(validation(8), adaptive(compress_slope=0.001))
    assert warning is not None and "no count up to 512 is enough: raise window" in warning
    assert expected_slope_reach(validation(8), adaptive(window=9), 24) < expected_slope_reach(validation(8), adaptive(), 24)


@pytest.mark.parametrize("mode", ["fid_trend", "fid_gap"])
def test_three_held_out_pictures_tell_nothing(mode: str) -> None:
    warning = pictures_warning(validation(64, reference=3), adaptive(mode=mode))
    assert warning is not None and "can decide nothing: 3 held-out pictures" in warning
