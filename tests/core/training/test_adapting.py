"""The controller over a session: ranks and bits change with the next step, come back, and an interruption changes nothing."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_compress import AdaptiveSettings, CompressionSettings, SettingsError
from lora_compress.training import SessionController, TrainingSession, find_pairs

STEPS = 40  # pruning ends at 8, quantization begins at 8, scales freeze at 38
SETTINGS = {
    "iterative_pruning": True,
    "rank_return": True,
    "rank_ratio": 0.5,
    "min_rank": 0,
    "pruning_end": 0.2,
    "max_iterations": 2,
}
QAT = {"qat": True, "qat_start": 0.2, "bits": 8, "qat_refresh": 4}


class Adapted(nn.Module):
    """Two layers with a LoRA of rank 8 each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (inputs, outputs) in {"a": (32, 48), "b": (48, 16)}.items():
            module = nn.Module()
            module.lora_down, module.lora_up = nn.Linear(inputs, 8, bias=False), nn.Linear(8, outputs, bias=False)
            for layer in (module.lora_down, module.lora_up):
                layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * 0.3
            module.lora_name, module.scale, module.multiplier = f"lora_unet_{name}", 1.0, 1.0
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in (self.a, self.b):
            x = module.lora_up(module.lora_down(x))
        return x


class Run:
    """A training that can be copied in the middle."""

    def __init__(self, **values: Any) -> None:
        self.network = Adapted()
        settings = CompressionSettings.parse({**SETTINGS, **values})
        self.session = TrainingSession(find_pairs(self.network), settings, STEPS)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=3e-3)
        self.step = 0

    def train(self, until: int) -> None:
        while self.step < until:
            generator = torch.Generator().manual_seed(self.step)
            x, y = torch.randn(16, 32, generator=generator), torch.randn(16, 16, generator=generator)
            self.optimizer.zero_grad()
            (self.network(x) - y).square().mean().backward()
            self.optimizer.step()
            self.step += 1

    def output(self) -> Tensor:
        with torch.no_grad():
            return self.network(torch.randn(4, 32, generator=torch.Generator().manual_seed(99)))

    def kept(self) -> int:
        return int(self.session.state.kept.sum())


def entry(step: int, value: float, full: float | None = None) -> dict[str, Any]:
    return {"step": step, "fid": value, "fid_floor": 1.0} | ({} if full is None else {"fid_full": full})


def led(run: Run, **values: Any) -> SessionController:
    return SessionController(run.session, AdaptiveSettings.parse(values))


def test_a_change_takes_effect_with_the_next_step_and_what_went_comes_back() -> None:
    run = Run(**QAT)
    controller = led(run, mode="fid_gap", patience=1)
    run.train(12)
    assert run.kept() == 8 and run.session.settled and controller.compression.bits == 8
    masked = {name: ~run.session.kept(name) for name in run.session.pairs}
    before = {name: pair.live_rows()[1][masked[name]].clone() for name, pair in run.session.pairs.items()}

    history: list[dict[str, Any]] = []

    def evaluate(value: float, full: float) -> dict[str, Any]:
        found = entry(run.step, value, full)
        found |= controller.decide(history, found)
        history.append(found)
        output, kept = run.output(), run.kept()
        controller.apply(found)
        assert torch.equal(run.output(), output) and run.kept() == kept  # not yet
        return found

    run.train(13)
    assert [evaluate(10.0, 5.0)["action"] for _ in range(2)] == ["keep"] * 2  # three measurements are needed
    relaxed = evaluate(10.0, 5.0)
    assert relaxed["action"] == "relax" and relaxed["next"] == {"rank_ratio": 0.6, "bits": 8, "strategy": "dynamic"}
    assert "next" not in history[0] and relaxed["rank_ratio"] == 0.5
    assert all(torch.equal(pair.live_rows()[1][masked[n]], before[n]) for n, pair in run.session.pairs.items())  # kept as they were
    run.train(14)
    assert run.kept() == int(0.6 * 16) and run.session.settings.pruning.rank_ratio == 0.6
    tightened = [evaluate(5.0, 5.0) for _ in range(1)][-1]
    assert tightened["action"] == "compress" and tightened["next"]["bits"] == 6
    run.train(15)
    assert run.session.settings.quantization.bits == 6 and run.kept() == int(0.55 * 16)
    for name, pair in run.session.pairs.items():
        for side, grid in enumerate(("down_grid", "up_grid")):
            rows = pair.rows(side, run.session.effective_weight(name, side)).detach()
            codes = rows[run.session.kept(name)] / run.session.state.part(grid, name)[run.session.kept(name)][:, :1]
            assert float((codes[:, :32] - codes[:, :32].round()).abs().max()) < 1e-3 and float(codes[:, :32].abs().max()) <= 32.0


def test_uncompressed_is_what_is_trained() -> None:
    run = Run(**QAT)
    led(run)
    run.train(12)
    plain = Adapted()
    plain.load_state_dict(run.network.state_dict())
    compressed = run.output()
    with run.session.uncompressed():
        bare = run.output()
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(99))
    assert torch.equal(bare, plain(x)) and not torch.equal(bare, compressed) and torch.equal(run.output(), compressed)


@pytest.mark.parametrize("values", [QAT, {}, {**QAT, "strategy": "entropy", "bits": 5}, {**QAT, "importance": "sensitivity"}])
def test_a_training_resumed_between_decision_and_step_ends_the_same(values: dict[str, Any]) -> None:
    def go(run: Run, controller: SessionController, history: list[dict[str, Any]], until: int) -> None:
        for step in range(run.step + 1, until + 1):
            run.train(step)
            if step >= 12 and step % 3 == 0:
                found = entry(step, 5.0 if step < 24 else 30.0 + step, 5.0)
                found |= controller.decide(history, found)
                history.append(found)
                controller.apply(found)

    whole, history = Run(**values), list[dict[str, Any]]()
    controller = led(whole, mode="fid_trend")
    go(whole, controller, history, 21)
    assert "next" in history[-1]  # decided, not done
    saved = copy.deepcopy((whole.network.state_dict(), whole.session.state.state_dict(), whole.optimizer.state_dict(), history))
    go(whole, controller, history, STEPS)
    assert {found["action"] for found in history} >= {"compress", "keep"} and "relax" in {found["action"] for found in history}

    again = Run(**values)
    resumed = led(again, mode="fid_trend")
    past = saved[3]
    again.session.state.on_load(lambda: resumed.restore(past))
    again.network.load_state_dict(saved[0])
    again.session.state.load_state_dict(saved[1])
    again.optimizer.load_state_dict(saved[2])
    again.step = 21
    go(again, resumed, past, STEPS)
    assert past == history
    tensors = [run.session.compress() for run in (whole, again)]
    assert tensors[0].tensors.keys() == tensors[1].tensors.keys()
    assert all(torch.equal(tensor, tensors[1].tensors[key]) for key, tensor in tensors[0].tensors.items())
    assert tensors[0].metadata == tensors[1].metadata
    assert tensors[0].metadata["ss_compress_adaptive"] == "fid_trend"
    assert "step 21: " in tensors[0].metadata["ss_compress_adaptive_changes"]


def test_at_the_end_what_is_masked_is_gone_and_nothing_is_decided() -> None:
    run = Run(**QAT)
    controller = led(run)
    run.train(STEPS)
    assert run.kept() == 8
    for name, pair in run.session.pairs.items():
        assert all(not rows[~run.session.kept(name)].any() for rows in pair.live_rows())
    assert controller.decide([], entry(STEPS, 9.0, 1.0))["reason"] == "scales are frozen"
    assert run.session.compress().metadata["ss_compress_components"] == "8/16"


def test_before_the_schedule_has_ended_nothing_is_decided() -> None:
    run = Run(**QAT)
    controller = led(run)
    run.train(7)
    found = controller.decide([entry(step, 9.0, 1.0) for step in range(4)], entry(7, 9.0, 1.0))
    assert found == {"action": "keep", "reason": "pruning and quantization are still on their way"} and not controller.wants_full


def test_a_failed_evaluation_changes_nothing() -> None:
    run = Run(**QAT)
    controller = led(run, mode="fid_trend")
    run.train(12)
    history = [entry(step, 5.0) | controller.decide([], entry(step, 5.0)) for step in range(9, 12)]
    assert "next" in controller.decide(history[:2], history[2])
    for failed in ({"step": 12, "error": "no"}, entry(12, float("nan"))):
        found = controller.decide(history, failed)
        assert "next" not in found and found["reason"] == "the last evaluation failed"


def test_a_session_reads_how_sure_its_metric_is_and_leaves_out_what_cannot_be_compared() -> None:
    run = Run(**QAT)
    controller = led(run, mode="fid_trend")
    run.train(12)

    def decided(**more: Any) -> dict[str, Any]:
        history: list[dict[str, Any]] = []
        for step in (10, 11, 12):
            found = entry(step, 5.0) | more | ({"pictures": step} if more.get("pictures") == 0 else {})
            history.append(found | controller.decide(history, found))
        return history[-1]

    spread = {"fid_jackknife": [[1.0, 9.0] * 10, [5.0] * 20]}
    assert decided()["action"] == decided(**spread)["action"] == "compress"  # the spread is common to all three
    assert decided(fid_interval=[1.0, 9.0])["action"] == "keep"
    assert decided(pictures=0)["reason"] == "1 of 3 measurements"  # with other numbers of pictures


def test_bits_that_a_strategy_does_not_have_switch_it() -> None:
    run = Run(**{**QAT, "strategy": "nf4", "bits": 4})
    controller = led(run, mode="fid_trend", relax_slope=0.5)
    run.train(12)
    history = []
    for step, value in ((10, 1.0), (11, 5.0), (12, 9.0)):
        found = entry(step, value)
        history.append(found | controller.decide(history, found))
    assert history[-1]["next"] == {"rank_ratio": 0.6, "bits": 6, "strategy": "dynamic"} and "nf4" in history[-1]["reason"]
    controller.apply(history[-1])
    run.train(13)
    assert run.session.settings.quantization.bits == 6
    assert run.session.compress().metadata["ss_compress_strategy"] == "dynamic"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_return": False}, "rank_return=true"),
        ({"rank_ratio": 1.0, "new_rank": 4}, "rank_ratio: give one below 1"),
        ({"target_error": 0.1}, "a target both decide"),
    ],
)
def test_a_session_that_cannot_relax_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        led(Run(**values))


def test_a_session_may_be_collected_while_another_one_steps() -> None:
    """torch iterates over its hooks then: no session may take its own away."""
    run, gone = Run(**QAT), Run(**QAT)
    before = run.session.before_step

    def collecting() -> None:
        nonlocal gone
        gone = None  # type: ignore[assignment]
        gc.collect()
        before()

    run.session.before_step = collecting  # type: ignore[method-assign]
    run.train(2)
    assert run.session.step == 2
