"""A compression under way: each module is fetched as its turn comes, and what is told of it is what it came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import pytest
import torch
from core.factories import dense, mixed_updates, random_update, update_of_spectrum

from lora_compress import CompressionSettings, FormatError, LowRankUpdate
from lora_compress.engine.encode import EncodedModule, Encoder, pad_to_two
from lora_compress.layouts.plain import FP8, PlainKeys
from lora_compress.packed.module import decode_module
from lora_compress.quantization import ModulePlan

PEFT = PlainKeys("{}.lora_A.weight", "{}.lora_B.weight", None)
FORMS: dict[str, tuple[dict[str, object], ModulePlan]] = {
    "plain": ({"new_rank": 8}, ModulePlan(5)),
    "int8": ({"bits": 8}, ModulePlan(5)),
    "int2": ({"bits": 2}, ModulePlan(8)),
    "mixed": ({"strategy": "mixed", "bits": 4}, ModulePlan(3, (8, 4, 2))),
    "entropy": ({"strategy": "entropy", "bits": 4}, ModulePlan(8, step_size=0.05)),
    "channels": ({"bits": 6, "channel_threshold": 0.7}, ModulePlan(8)),
    "plain channels": ({"new_rank": 8, "channel_threshold": 0.7}, ModulePlan(8)),
    "int4 in kohya": ({"bits": 4, "save_format": "kohya"}, ModulePlan(4)),
}


class Counting(Mapping[str, LowRankUpdate]):
    """Updates that are made when they are asked for, and how often each was."""

    def __init__(self, updates: Mapping[str, LowRankUpdate]) -> None:
        self._updates = updates
        self.asked: Counter[str] = Counter()

    def __getitem__(self, name: str) -> LowRankUpdate:
        self.asked[name] += 1
        return self._updates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._updates)

    def __len__(self) -> int:
        return len(self._updates)


def encoder(form: str, updates: Mapping[str, LowRankUpdate], dtype: torch.dtype = torch.float32, **more: object) -> Encoder:
    return Encoder(updates, CompressionSettings.parse(FORMS[form][0]), dtype, **more)  # type: ignore[arg-type]


def result(stored: EncodedModule) -> LowRankUpdate:
    if stored.plain is not None:
        return stored.plain
    assert stored.entry is not None
    return decode_module(stored.entry, [chunk.read() for chunk in stored.chunks])


@pytest.mark.parametrize("form", FORMS)
def test_the_error_that_is_told_is_the_error(form: str) -> None:
    updates = mixed_updates()
    work = encoder(form, updates)
    found = dict(work.run(dict.fromkeys(updates, FORMS[form][1])))
    assert list(found) == list(updates)
    for name, stored in found.items():
        exact = dense(updates[name])
        lost = float((exact - dense(result(stored))).square().sum())
        assert stored.squared_error == pytest.approx(lost, rel=2e-3, abs=1e-9 * float(exact.square().sum()))
        assert work.components[name].norm == pytest.approx(float(exact.square().sum()), rel=1e-9)
        assert stored.payload == sum(map(len, stored.chunks)) or not work.packed


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_fetched_once_to_know_a_module_and_once_to_make_it(form: str) -> None:
    updates = Counting(mixed_updates())
    work = encoder(form, updates)
    assert set(updates.asked.values()) == {1}
    for analysis in work.components.values():
        assert analysis.spectrum.update.down.is_meta and analysis.spectrum.update.up.is_meta
    list(work.run(dict.fromkeys(updates, FORMS[form][1])))
    assert set(updates.asked.values()) == {2}


def test_modules_that_are_not_kept_are_not_fetched() -> None:
    updates = Counting(mixed_updates())
    work = encoder("int8", updates)
    first, *others = updates
    assert [name for name, _ in work.run({first: ModulePlan(0), **dict.fromkeys(others, ModulePlan(2))})] == others
    assert updates.asked[first] == 1


@pytest.mark.parametrize("form", ["plain", "plain channels", "int4 in kohya"])
@pytest.mark.parametrize("keys", [None, PEFT])
def test_an_outline_has_the_room_that_the_modules_take(form: str, keys: PlainKeys | None) -> None:
    updates = mixed_updates()
    work = encoder(form, updates, torch.float16, **({"keys": lambda name: keys} if keys else {}))
    choices = {name: ModulePlan(rank) for name, rank in zip(updates, (1, 2, 5, 0), strict=True)}
    outline, found = work.outline(choices), dict(work.run(choices))
    assert outline.keys() == found.keys()
    for name, stored in found.items():
        assert stored.plain is not None
        assert outline[name].padded == stored.padded == stored.plain.rank == max(choices[name].rank, 2)
        assert outline[name].alpha == stored.alpha == (float(stored.padded) if keys else 1.0)


@pytest.mark.parametrize("form", ["plain", "plain channels"])
def test_modules_of_one_shape_come_out_together_as_they_come_out_alone(form: str) -> None:
    updates = {f"m{i}": random_update(12, 60, 40, seed=i, magnitude=10.0**-i) for i in range(9)}
    updates |= {f"c{i}": random_update(12, 60, 40, (3, 3), seed=i) for i in range(5)}
    work = encoder(form, updates, torch.float16)
    choices = {name: ModulePlan(3 + (number % 4 == 0)) for number, name in enumerate(updates)}
    together = dict(work.run(choices))
    assert list(together) == list(updates)
    for name, choice in choices.items():
        ((_, alone),) = work.run({name: choice})
        both = together[name].plain, alone.plain
        assert both[0] is not None and both[1] is not None
        assert together[name].squared_error == pytest.approx(alone.squared_error, rel=1e-6)
        assert torch.allclose(both[0].down.float(), both[1].down.float(), rtol=2e-3, atol=1e-6)
        assert torch.allclose(both[0].up.float(), both[1].up.float(), rtol=2e-3, atol=1e-6)


def test_padding_is_asked_for_once_and_filled_with_zeros() -> None:
    updates = mixed_updates()
    work = encoder("plain", updates, pad=lambda ranks: dict.fromkeys(ranks, max(pad_to_two(ranks).values())))
    found = dict(work.run({name: ModulePlan(rank) for name, rank in zip(updates, (1, 2, 5, 3), strict=True)}))
    for (name, stored), rank in zip(found.items(), (1, 2, 5, 3), strict=True):
        assert stored.plain is not None
        assert (stored.plain.rank, stored.rank) == (5, rank)
        assert not stored.plain.down[rank:].any() and not stored.plain.up[:, rank:].any()
        sigma = torch.linalg.svdvals(dense(updates[name]))
        assert float(torch.linalg.svdvals(dense(stored.plain))[rank - 1]) == pytest.approx(float(sigma[rank - 1]), rel=1e-3)


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 300.0])
def test_fp8_factors_keep_within_their_range(magnitude: float) -> None:
    updates = {f"m{i}": random_update(6, 40, 30, seed=i, magnitude=magnitude * 10.0**i) for i in range(3)}
    work = Encoder(updates, CompressionSettings.parse({"save_format": "fp8"}), FP8)
    found = dict(work.run(dict.fromkeys(updates, ModulePlan(6))))
    assert len({stored.alpha for stored in found.values()}) == 1
    largest = [float(factor.float().abs().amax()) for s in found.values() if s.plain for factor in (s.plain.down, s.plain.up)]
    assert 1.0 < max(largest) <= 16.0
    for name in ("m1", "m2"):  # the weakest may fall below the range
        exact = dense(updates[name])
        assert found[name].squared_error < 0.06**2 * float(exact.square().sum())


def test_a_prediction_of_sizes_and_errors_is_close() -> None:
    updates = {f"m{i}": update_of_spectrum([2.0 / (k + 1) for k in range(8)], 90, 70, seed=i) for i in range(6)}
    work = encoder("entropy", updates)
    choices = {name: ModulePlan(8, step_size=0.02) for name in updates}
    predicted, found = work.predict(choices), dict(work.run(choices))
    assert predicted.keys() == found.keys()
    for field in ("payload", "squared_error"):
        told, true = (sum(getattr(stored, field) for stored in which.values()) for which in (predicted, found))
        assert told == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["plain", "entropy", "channels"])
def test_a_module_that_holds_no_numbers_is_named(form: str, bad: float) -> None:
    updates = mixed_updates()
    name = list(updates)[2]
    updates[name].up[0, 0] = bad
    with pytest.raises(FormatError, match=f"^{name}: .*NaN or infinity"):
        encoder(form, updates)
