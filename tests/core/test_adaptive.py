"""The controller: its rules to the letter, and simulations over histories of every kind."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lora_compress import SettingsError
from lora_compress.settings import AdaptiveSettings, allows_bits
from lora_compress.training.controller import CONTROLLERS, Compression, Decision, adaptive_compression_strategy, decide, fid_gap

TREND = AdaptiveSettings(mode="fid_trend")
START = Compression(0.8, 8)
RECORDED: list[dict[str, float]] = json.loads((Path(__file__).parent / "data" / "history.json").read_text(encoding="utf-8"))


def trend(values: list[float | None], current: Compression = START, **settings: Any) -> Decision:
    return adaptive_compression_strategy([{"fid": v} for v in values], current, AdaptiveSettings(mode="fid_trend", **settings))


@pytest.mark.parametrize(
    ("values", "action"),
    [
        ([], "keep"),
        ([50.0, 40.0], "keep"),
        ([50.0, 50.0, 50.0], "compress"),
        ([50.0, 50.19, 50.38], "compress"),
        ([50.0, 50.21, 50.42], "keep"),
        ([50.0, 50.49, 50.98], "keep"),
        ([50.0, 50.51, 51.02], "relax"),
        ([50.0, 49.0, 48.0], "keep"),
        ([50.0, 49.9, 49.8], "compress"),
        ([0.0, 100.0, 50.0, 50.0, 50.0], "compress"),  # only the window counts
        ([50.0, 52.0, 50.0], "compress"),  # the line through them is level
    ],
)
def test_the_slope_of_the_last_values_decides(values: list[float | None], action: str) -> None:
    assert trend(values, Compression(0.6, 6)).action == action


def test_the_slope_is_per_evaluation_over_the_whole_window() -> None:
    rising = [50.0 + 0.3 * i for i in range(9)]
    assert trend(rising).action == "keep"
    assert trend(rising, relax_slope=0.25, window=7).action == "relax"
    assert trend([0, 0, 0, 0, 3.0], window=5).action == "relax"  # slope 0.6; 1.5 over the last three
    assert trend([0, 0, 0, 0, 2.0], window=5).action == "keep"  # slope 0.4


@pytest.mark.parametrize(
    ("action", "before", "after"),
    [
        ("relax", (0.5, 4), (0.6, 6)),
        ("relax", (0.85, 6), (0.9, 8)),
        ("relax", (0.9, 8), (0.9, 8)),
        ("relax", (1.0, 16), (1.0, 16)),  # never takes: the snippet's min(0.9, ...) would
        ("relax", (0.5, 7), (0.6, 8)),
        ("relax", (0.5, 3), (0.6, 5)),
        ("relax", (0.5, 5), (0.6, 8)),  # no strategy of whole bits has 7
        ("compress", (0.8, 8), (0.75, 6)),
        ("compress", (0.32, 5), (0.3, 4)),
        ("compress", (0.3, 4), (0.3, 4)),
        ("compress", (0.2, 2), (0.2, 2)),  # never adds: the snippet's max(bits - 2, 4) would
        ("compress", (0.8, 16), (0.75, 8)),  # there is no 14
        ("compress", (0.8, None), (0.75, None)),
    ],
)
def test_steps_and_bounds(action: str, before: tuple[float, float | None], after: tuple[float, float | None]) -> None:
    values = [50.0, 51.0, 52.0] if action == "relax" else [50.0, 50.0, 50.0]
    decision = trend(values, Compression(*before))
    assert (decision.compression.rank_ratio, decision.compression.bits) == after
    assert decision.action == (action if before != after else "keep")
    assert decision.compression.strategy == "dynamic"


def test_bits_that_nf4_cannot_take_switch_it_to_dynamic_and_say_so() -> None:
    decision = trend([50.0, 51.0, 52.0], Compression(0.5, 4, "nf4"))
    assert decision.compression == Compression(0.6, 6, "dynamic")
    assert "strategy nf4 -> dynamic" in decision.reason and "nf4 has no 6 bits" in decision.reason
    kept = trend([50.0, 50.0, 50.0], Compression(0.5, 4, "nf4"))
    assert kept.compression == Compression(0.45, 4, "nf4")
    averages = trend([50.0, 51.0, 52.0], Compression(0.5, 4.5, "mixed"))
    assert averages.compression == Compression(0.6, 6.5, "mixed")


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("failed", [math.nan, math.inf, -math.inf, None, "31.2", True])
def test_a_failed_evaluation_changes_nothing(controller: str, failed: object) -> None:
    good = {"fid": 50.0, "fid_full": 50.0}
    settings = AdaptiveSettings(mode=controller)
    assert decide([good] * 5, START, settings).action == "compress"
    for bad in ({"fid": failed, "fid_full": 50.0}, {}, None):
        decision = decide([good] * 5 + [bad], START, settings)
        assert decision == Decision(START, "keep", "the last evaluation failed")


def test_failed_evaluations_in_between_keep_their_places() -> None:
    """1 per evaluation, with two of five missing: still a slope of 1, not 2."""
    assert "+1 per evaluation" in trend([50.0, math.nan, 52.0, None, 54.0]).reason


def test_metrics_other_than_fid_count_in_units_of_their_floor() -> None:
    settings = AdaptiveSettings(mode="fid_trend", metric="probe_fd")
    history = [{"probe_fd": 0.01 * i, "floor": 0.01} for i in range(4)]
    assert adaptive_compression_strategy([{"fid": 0.01 * i} for i in range(4)], Compression(0.5, 4)).action == "compress"
    assert adaptive_compression_strategy(history, Compression(0.5, 4), settings).action == "relax"
    assert decide([{"probe_fd": 0.01}] * 4, START, settings).reason == "the last evaluation failed"  # no floor, no unit


def gaps(*values: float, level: tuple[float, float] = (0.8, 8)) -> list[dict[str, float]]:
    return [{"fid": 50.0 * (1 + gap), "fid_full": 50.0, "rank_ratio": level[0], "bits": level[1]} for gap in values]


@pytest.mark.parametrize(
    ("values", "action"),
    [
        ((0.0, 0.0), "keep"),  # fewer than three measurements
        ((0.0, 0.0, 0.0), "compress"),
        ((-0.3, -0.2, -0.1), "compress"),
        ((0.0, 0.0, 0.03), "keep"),  # between half of max_fid_gap and all of it
        ((0.0, 0.03, 0.02), "keep"),  # patience: the one before was not under it
        ((0.0, 0.06, 0.06), "relax"),
        ((0.06, 0.04, 0.06), "keep"),
    ],
)
def test_the_gap_decides_with_hysteresis_and_patience(values: tuple[float, ...], action: str) -> None:
    level = (0.6, 6)
    assert fid_gap(gaps(*values, level=level), Compression(*level)).action == action


def test_only_evaluations_of_the_current_compression_count() -> None:
    history = gaps(0.0, 0.0, 0.0, level=(0.8, 8)) + gaps(0.1, level=(0.75, 6))
    decision = fid_gap(history, Compression(0.75, 6))
    assert decision.action == "keep" and "1 of 2 evaluations" in decision.reason
    assert fid_gap(history + gaps(0.1, level=(0.75, 6)), Compression(0.75, 6)).action == "relax"


def test_training_progress_is_not_room_to_compress() -> None:
    """FID falls by 2 each time, compressed always 10 % behind: the trend says keep and then compress, the gap says relax."""
    history = [{"fid": 1.1 * max(60 - 2 * i, 40), "fid_full": max(60 - 2 * i, 40)} for i in range(15)]
    assert adaptive_compression_strategy(history[:6], Compression(0.5, 4)).action == "keep"
    assert adaptive_compression_strategy(history, Compression(0.5, 4)).action == "compress"
    assert fid_gap(history, Compression(0.5, 4)).action == "relax"


def uncertain(value: float, spread: float) -> dict[str, Any]:
    """An entry of which one half of the replicates is `spread` below the value, the other half as far above it."""
    return {"fid": value, "fid_jackknife": [[value - spread, value + spread] * 10, [value] * 20]}


def test_a_trend_is_followed_only_where_its_whole_interval_says_so() -> None:
    level = Compression(0.6, 6)
    flat = [uncertain(50.0, 0.01), uncertain(50.0, -0.01), uncertain(50.0, 0.01)]
    assert adaptive_compression_strategy(flat, level).action == "compress"
    rough = [uncertain(50.0, 5.0), uncertain(50.0, -5.0), uncertain(50.0, -5.0)]
    decision = adaptive_compression_strategy(rough, level)
    assert decision.action == "keep" and "too wide to decide" in decision.reason and "95 % interval" in decision.reason
    rising = [uncertain(50.0 + 2 * place, spread) for place, spread in enumerate((0.1, -0.1, 0.1))]
    assert adaptive_compression_strategy(rising, level).action == "relax"
    doubtful = [uncertain(50.0 + 2 * place, spread) for place, spread in enumerate((9.0, 0.0, -9.0))]
    assert adaptive_compression_strategy(doubtful, level).action == "keep"


def test_a_slope_that_is_too_unsure_is_answered_with_the_window_that_would_do() -> None:
    """The errors of each evaluation are its own, so the interval of the slope narrows as the window grows."""

    def measured(place: int) -> dict[str, Any]:
        size, half = 0.04 * math.sin(2.0 + 7 * place + 3 * place**2), 2 ** (place % 4)
        return {"fid": 50.0, "fid_jackknife": [[50.0 + size * (-1) ** (turn // half) for turn in range(20)], [50.0] * 20]}

    def decided(window: int) -> Decision:
        settings = AdaptiveSettings(mode="fid_trend", compress_slope=0.05, window=window)
        return adaptive_compression_strategy([measured(place) for place in range(40)], Compression(0.6, 6), settings)

    assert "too wide to decide: window=" in decided(3).reason
    named = int(decided(3).reason.split("window=")[1].split(" ")[0])
    assert 3 < named < 12 and decided(named + 2).action == "compress"


def test_errors_that_all_evaluations_have_in_common_do_not_count() -> None:
    """Each value is known to +/- 20, and yet it is certain that nothing changes: the same pictures moved all of them."""
    same = [uncertain(50.0, 10.0)] * 3
    assert adaptive_compression_strategy(same, Compression(0.6, 6)).action == "compress"
    as_wide = [{"fid": 50.0, "fid_interval": [30.0, 70.0]}] * 3  # an interval alone does not tell what is common
    assert adaptive_compression_strategy(as_wide, Compression(0.6, 6)).action == "keep"
    sharp = [{"fid": 50.0, "fid_interval": [49.99, 50.01]}] * 3
    assert adaptive_compression_strategy(sharp, Compression(0.6, 6)).action == "compress"


@pytest.mark.parametrize("mode", CONTROLLERS)
@pytest.mark.parametrize(
    "unknown", [{"fid_interval": [None, None]}, {"fid_jackknife": [[], []]}, {"fid_jackknife": [[1.0] * 4, []]}]
)
def test_too_few_pictures_for_an_interval_decide_nothing(mode: str, unknown: dict[str, Any]) -> None:
    entry = {"fid": 50.0, "fid_full": 50.0, **unknown}
    assert decide([entry] * 5, Compression(0.6, 6), AdaptiveSettings(mode=mode)).action == "keep"


def paired(gap: float, spread: float, common: float = 0.0) -> dict[str, Any]:
    """Compressed and full weights whose gap differs by `spread` with the pictures, and which both move by `common`."""
    ways = [-1.0, 1.0] * 10
    full = [50.0 + common * way for way in ways]
    compressed = [value * (1 + gap + spread * way) for value, way in zip(full, ways, strict=True)]
    return {
        "fid": 50.0 * (1 + gap),
        "fid_full": 50.0,
        "fid_jackknife": [compressed, [50.0 * (1 + gap)] * 20],
        "fid_full_jackknife": [full, [50.0] * 20],
        "pictures": 24,
        "rank_ratio": 0.6,
        "bits": 6,
    }


@pytest.mark.parametrize(
    ("gap", "spread", "common", "action"),
    [
        (0.0, 0.001, 0.0, "compress"),
        (0.0, 0.001, 10.0, "compress"),  # what both drawings have in common cancels
        (0.0, 0.02, 0.0, "keep"),
        (0.1, 0.001, 10.0, "relax"),
        (0.1, 0.02, 0.0, "keep"),
    ],
)
def test_a_gap_counts_only_where_its_whole_interval_says_so(gap: float, spread: float, common: float, action: str) -> None:
    decision = fid_gap([paired(gap, spread, common)] * 3, Compression(0.6, 6))
    assert decision.action == action
    if action == "keep":
        assert "too wide to decide: about " in decision.reason and "pictures would do" in decision.reason


def test_the_first_gap_already_says_how_many_pictures_it_takes() -> None:
    """Half the interval falls as one over the root of the pictures: with as many as it names, it would be as wide as allowed."""
    spread = 0.02
    reason = fid_gap([paired(0.0, spread)], Compression(0.6, 6)).reason
    named = int(reason.split("about ")[1].split(" ")[0])
    half = float(reason.split("+/- ")[1].split("%")[0]) / 100
    assert reason.startswith("1 of 3 measurements; ")
    assert half * math.sqrt(24 / named) == pytest.approx(0.025, rel=0.02)
    assert fid_gap([paired(0.0, 0.0001)], Compression(0.6, 6)).reason == "1 of 3 measurements"


def simulate(
    mode: str, response: Callable[[int, Compression], dict[str, Any] | None], steps: int = 60, start: Compression = START
) -> list[Compression]:
    """The compression of each evaluation where `response` says what that measures."""
    settings, history, current, path = AdaptiveSettings(mode=mode), [], start, []
    for step in range(steps):
        path.append(current)
        measured = response(step, current)
        history.append(measured and {**measured, "rank_ratio": current.rank_ratio, "bits": current.bits})
        current = decide(history, current, settings).compression
    return path


def cost(compression: Compression) -> float:
    """What compression costs of FID, relative: nothing at 0.9 and 8 bits, a fifth at 0.3 and 4."""
    return 0.1 * ((0.9 - compression.rank_ratio) / 0.6) ** 2 + 0.1 * ((8 - (compression.bits or 16)) / 4) ** 2


def world(kind: str, seed: int = 0) -> Callable[[int, Compression], dict[str, Any] | None]:
    """A training whose full FID falls from 60 to 40, and something that goes wrong with it."""
    noise = random.Random(seed)

    def response(step: int, compression: Compression) -> dict[str, Any] | None:
        full = 40 + 20 * math.exp(-step / 10)
        dearer = 4.0 if kind == "step change" and step >= 30 else 1.0
        fid = full * (1 + dearer * cost(compression))
        if kind == "noisy":
            fid *= 1 + noise.gauss(0, 0.01)
        elif kind == "very noisy":
            fid *= 1 + noise.gauss(0, 0.2)
        elif kind == "failing" and step % 3 == 1:
            return noise.choice(
                [None, {"fid": math.nan, "fid_full": full}, {"fid": math.inf, "fid_full": full}, {"fid_full": full}]
            )
        elif kind == "rising":
            fid = full = 40 + 3.0 * step
            fid *= 1 + cost(compression)
        return {"fid": fid, "fid_full": full}

    return response


WORLDS = ("monotone", "noisy", "very noisy", "step change", "failing", "rising")


@pytest.mark.parametrize("mode", CONTROLLERS)
@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize(
    "start", [START, Compression(0.3, 4), Compression(0.9, 8), Compression(0.5, 4, "nf4"), Compression(0.5, 5, "mixed")]
)
def test_no_history_leads_out_of_the_bounds(mode: str, kind: str, start: Compression) -> None:
    for seed in range(3):
        for compression in simulate(mode, world(kind, seed), start=start):
            assert 0.3 <= compression.rank_ratio <= 0.9
            assert 4 <= compression.bits <= 8  # type: ignore[operator]
            assert allows_bits(compression.strategy, compression.bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["monotone", "noisy", "step change", "failing", "rising"])
def test_the_gap_settles_where_compression_costs_what_it_may(kind: str) -> None:
    """Most of the second half is spent within the allowed gap, and changes become rarer."""
    path = simulate("fid_gap", world(kind), steps=120)
    dearer = 4.0 if kind == "step change" else 1.0
    inside = [dearer * cost(compression) <= 0.05 + 1e-9 for compression in path[60:]]
    assert sum(inside) >= 0.85 * len(inside)
    changes = [place for place, (one, next_one) in enumerate(pairwise(path)) if one != next_one]
    assert 1 <= len(changes) <= 20
    assert sum(place >= 60 for place in changes) <= max(6, sum(place < 60 for place in changes))
    assert min(compression.rank_ratio for compression in path) < 0.8, "it never tried to compress"


def recorded(step: int, compression: Compression) -> dict[str, Any]:
    """What tiny-sd measured with 16 pictures at the nearest compression that was recorded, a repeat after the other."""

    def away(entry: dict[str, float]) -> float:
        return abs(entry["rank_ratio"] - compression.rank_ratio) * 10 + abs(entry["bits"] - float(compression.bits or 16))

    nearest = min(map(away, RECORDED))
    entries = [entry for entry in RECORDED if away(entry) == nearest]
    entry = entries[step % len(entries)]
    return {"probe_fd": entry["probe_fd"], "probe_fd_full": entry["probe_fd_full"]}


def test_recorded_measurements_settle_within_what_they_may_cost() -> None:
    """tools/record_history.py made them: repeats of one compression differ by as much as compressions do."""
    settings = AdaptiveSettings(mode="fid_gap", metric="probe_fd", max_fid_gap=0.1)
    history, path, current = [], [], START
    for step in range(120):
        path.append(current)
        history.append({**recorded(step, current), "rank_ratio": current.rank_ratio, "bits": current.bits})
        current = fid_gap(history, current, settings).compression
    changes = [place for place, (one, next_one) in enumerate(pairwise(path)) if one != next_one]
    assert 1 <= len(changes) <= 20 and len([place for place in changes if place >= 60]) <= 6
    assert all(0.3 <= c.rank_ratio <= 0.9 and 4 <= c.bits <= 8 for c in path)  # type: ignore[operator]
    gaps_spent = [_mean_gap(compression) for compression in path[60:]]
    assert sum(gap <= 0.1 for gap in gaps_spent) >= 0.85 * len(gaps_spent)


def _mean_gap(compression: Compression) -> float:
    measured = [recorded(step, compression) for step in range(3)]
    return sum(m["probe_fd"] / m["probe_fd_full"] - 1 for m in measured) / len(measured)


def test_noise_makes_changes_rarer_not_endless() -> None:
    path = simulate("fid_gap", world("very noisy"), steps=400)
    changes = [place for place, (one, next_one) in enumerate(pairwise(path)) if one != next_one]
    assert len([place for place in changes if place >= 200]) < len([place for place in changes if place < 200])


def test_the_trend_settles_at_the_lower_bounds_once_training_has_converged() -> None:
    path = simulate("fid_trend", lambda step, _: {"fid": 40 + 20 * math.exp(-step / 3)}, steps=40)
    assert path[-8:] == [Compression(0.3, 4)] * 8
    rising = simulate("fid_trend", lambda step, _: {"fid": 40.0 + step}, steps=20, start=Compression(0.4, 4))
    assert rising[-8:] == [Compression(0.9, 8)] * 8


def test_settings_parse_text_and_numbers_and_tell_every_problem() -> None:
    settings = AdaptiveSettings.parse({"mode": "fid_trend", "window": "5", "relax_slope": 1, "max_bits": 6})
    assert settings == AdaptiveSettings(mode="fid_trend", window=5, relax_slope=1.0, max_bits=6.0)
    wrong = {"mode": "magic", "window": 2, "patience": 1.5, "min_rank_ratio": 0.95, "hysteresis": 1, "relax_slop": 1}
    with pytest.raises(SettingsError) as caught:
        AdaptiveSettings.parse(wrong)
    told = " ".join(caught.value.problems)
    for text in (
        "relax_slop: unknown setting, did you mean relax_slope?",
        "patience=1.5: must be a whole number",
        "mode=magic: must be one of fid_gap, fid_trend",
        "window=2: must be 3 or more",
        "hysteresis=1: must lie in (0, 1)",
        "min_rank_ratio=0.95 is above max_rank_ratio=0.9",
    ):
        assert text in told
    assert len(caught.value.problems) == 6
