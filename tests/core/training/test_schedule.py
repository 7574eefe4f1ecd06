"""Schedules at their boundaries, against lists made by hand."""

from __future__ import annotations

import pytest

from lora_compress import CompressionSettings
from lora_compress.training.schedule import Timeline, polynomial_schedule, pruning_steps


@pytest.mark.parametrize(
    ("begin", "end", "power", "expected"),
    [
        (0, 4, 1.0, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (1, 3, 3.0, [1.0, 1.0, 0.125, 0.0, 0.0]),
        (2, 2, 3.0, [1.0, 1.0, 0.0, 0.0]),
        (3, 1, 3.0, [1.0, 0.0, 0.0]),
        (0, 0, 1.0, [0.0, 0.0]),
    ],
)
def test_a_schedule_is_the_list_made_by_hand(begin: int, end: int, power: float, expected: list[float]) -> None:
    schedule = polynomial_schedule(begin, end, power)
    assert [schedule(step) for step in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("begin", "end", "count", "expected"),
    [(0, 10, 2, (5, 10)), (0, 10, 3, (4, 7, 10)), (4, 7, 9, (5, 6, 7)), (4, 7, 1, (7,)), (5, 5, 3, (5,))],
)
def test_pruning_steps_lie_after_the_begin_and_the_last_one_at_the_end(
    begin: int, end: int, count: int, expected: tuple[int, ...]
) -> None:
    assert pruning_steps(begin, end, count) == expected


def timeline(total: int, **values: object) -> Timeline:
    given = {"iterative_pruning": True, "rank_ratio": 0.5, "qat": True, "bits": 4, **values}
    settings = CompressionSettings.parse(given)
    return Timeline.of_settings(settings.training, settings.quantized_training, total)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100, 1001])
@pytest.mark.parametrize("shares", [(0.0, 0.01), (0.1, 0.6), (0.9, 1.0)])
def test_everything_happens_within_the_training_in_order(total: int, shares: tuple[float, float]) -> None:
    line = timeline(total, pruning_start=shares[0], pruning_end=shares[1], qat_start=shares[0], collect_calibration=True)
    assert line.rotation is not None and line.quantization is not None and line.sampling is not None
    assert 1 <= line.rotation <= line.pruning[0] <= line.pruning[-1] <= max(total, 1)
    assert list(line.pruning) == sorted(set(line.pruning))
    weights = [line.above_goal(step) for step in line.pruning]
    assert weights == sorted(weights, reverse=True) and weights[-1] == 0.0
    assert 1 <= line.quantization <= total and 0 <= line.sampling < total


def test_scales_are_searched_often_at_first_then_at_intervals_and_in_the_end_not_at_all() -> None:
    line = timeline(100, qat_start=0.5, qat_refresh=10)
    assert [step for step in range(101) if line.refreshes(step)] == [51, 52, 54, 58, 60, 66, 70, 80, 82, 90]
    assert not any(timeline(100, qat=False).refreshes(step) for step in range(101))
