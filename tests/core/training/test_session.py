"""A session on plain torch layers: what it does when, and that it does nothing else."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lora_compress import CompressionSettings, FormatError, SettingsError
from lora_compress.training import Pair, TrainingSession
from tests.core.training.nets import Net, batch, loss_of, train

PRUNING = {"iterative_pruning": True, "rank_ratio": 0.5, "min_rank": 1, "max_iterations": 3}
QAT = {"qat": True, "bits": 4, "group_size": 16, "qat_start": 0.5}


def start(total: int = 40, rank: int = 6, **values: Any) -> tuple[Net, TrainingSession, torch.optim.Optimizer]:
    net = Net(rank)
    session = TrainingSession(net.pairs(), CompressionSettings.parse(values), total)
    return net, session, torch.optim.AdamW(net.parameters_of_pairs(), lr=1e-2, weight_decay=0.1)


def dense(net: Net) -> dict[str, torch.Tensor]:
    return {name: pair.update().dense() for name, pair in net.pairs().items()}


def kept(session: TrainingSession) -> dict[str, int]:
    return {name: int(session.kept(name).sum()) for name in session.pairs}


@pytest.mark.parametrize("values", [{}, PRUNING, QAT | {"qat_start": 0.9}])
def test_before_anything_is_due_the_layers_are_the_hosts_own_and_so_is_the_training(values: dict[str, Any]) -> None:
    plain = Net()
    expected = train(plain, torch.optim.AdamW(plain.parameters_of_pairs(), lr=1e-2, weight_decay=0.1), range(3))
    net, session, optimizer = start(**values)
    assert train(net, optimizer, range(3)) == expected
    assert all(
        layer.weight is pair.weights[side] for pair in session.pairs.values() for side, layer in enumerate((pair.down, pair.up))
    )


@pytest.mark.parametrize("importance", ["magnitude", "sensitivity", "activation"])
@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_components_go_step_by_step_until_the_budget_is_met(importance: str, schedule: str) -> None:
    net, session, optimizer = start(importance=importance, pruning_schedule=schedule, pruning_start=0.1, pruning_end=0.7, **PRUNING)
    counts = []
    train(net, optimizer, range(40), lambda step: counts.append(sum(kept(session).values())))
    assert counts == sorted(counts, reverse=True)
    power = {"cubic": 3, "linear": 1}[schedule]
    assert [counts[step - 1] for step in (4, 12, 20, 28, 40)] == [18, 9 + int(9 * (2 / 3) ** power), 9 + int(9 / 3**power), 9, 9]


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adagrad])
def test_a_pruning_step_takes_the_weakest_components_of_the_network_and_nothing_else(optimizer_class: Any) -> None:
    net, session, _ = start(total=12, rank=5, pruning_start=0.3, pruning_end=0.5, **PRUNING | {"max_iterations": 1})
    optimizer = optimizer_class(net.parameters_of_pairs(), lr=1e-2)
    before: dict[int, Any] = {}

    def remember(*_: Any) -> None:  # an optimizer's own hooks run before the global ones
        before[session.step + 1] = dense(net), copy.deepcopy(net)

    optimizer.register_step_post_hook(remember)
    train(net, optimizer, range(6))
    (step,) = session.timeline.pruning  # type: ignore[union-attr]
    assert session.step == step == 6
    full, twin = before[6]
    values = {name: torch.linalg.svdvals(matrix)[:5] for name, matrix in full.items()}
    least = torch.cat(list(values.values())).sort(descending=True).values[6]
    for name, matrix in full.items():
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        expected = u * torch.where(sigma >= least * (1 - 1e-6), sigma, 0.0) @ vh
        assert torch.allclose(dense(net)[name], expected, atol=1e-6)
        weights = getattr(twin, name)
        weights.down.weight.data, weights.up.weight.data = _factors(expected, weights)
    assert loss_of(net) == pytest.approx(loss_of(twin), rel=1e-4)  # the loss jumps by what was removed, and by no more


def _factors(matrix: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    u, sigma, vh = torch.linalg.svd(matrix.float() / layer.scale, full_matrices=False)
    rank = layer.down.weight.shape[0]
    return (vh[:rank] * sigma[:rank, None]).reshape_as(layer.down.weight), u[:, :rank].reshape_as(layer.up.weight)


def test_a_rotation_alone_leaves_the_loss_where_it_was() -> None:
    net, session, optimizer = start(total=20, pruning_start=0.25, **PRUNING)
    before = {}
    optimizer.register_step_post_hook(lambda *_: before.update({session.step + 1: loss_of(net)}))
    train(net, optimizer, range(5))
    assert session.timeline is not None and session.timeline.rotation == 5
    assert loss_of(net) == pytest.approx(before[5], rel=1e-5)
    for pair in session.pairs.values():
        down, up = (rows.double() for rows in pair.live_rows())
        assert torch.allclose(down.norm(dim=1)[:5], up.norm(dim=1)[:5], rtol=1e-4)  # `second` has 5 outputs: the last is unused
        assert torch.allclose(up @ up.T, torch.diag((up @ up.T).diagonal()), atol=1e-5 * float(up.norm()) ** 2)


@pytest.mark.parametrize("returning", [False, True])
def test_masked_components_do_not_move(returning: bool) -> None:
    """AdamW with weight decay and a momentum from before would move them. Those that may return keep their weights till the end."""
    net, session, optimizer = start(total=40, pruning_start=0.1, pruning_end=0.7, rank_return=returning, **PRUNING)
    train(net, optimizer, range(12))  # the first of three pruning steps has just been made
    masked = {name: ~session.kept(name) for name in session.pairs}
    assert 0 < sum(int(mask.sum()) for mask in masked.values()) < 9
    pairs = net.pairs().items()
    before = {name: [pair.pick(i, w.detach().clone(), masked[name]) for i, w in enumerate(pair.weights)] for name, pair in pairs}
    assert any(bool(part.any()) for parts in before.values() for part in parts) is returning
    train(net, optimizer, range(12, 19))
    for name, pair in pairs:
        for side, weight in enumerate(pair.weights):
            assert torch.equal(pair.pick(side, weight.detach(), masked[name]), before[name][side])
        assert not pair.pick(1, session.effective_weight(name, 1), masked[name]).any()
    train(net, optimizer, range(19, 40))
    gone = {name: ~session.kept(name) for name in session.pairs}
    assert sum(int(mask.sum()) for mask in gone.values()) == 9
    for name, pair in pairs:
        assert not any(pair.pick(side, weight.detach(), gone[name]).any() for side, weight in enumerate(pair.weights))
        assert pair.up.weight is pair.weights[1]
    assert all(pair.scale == 0.5 for _, pair in pairs)


def test_a_component_may_return_while_ranks_are_open() -> None:
    """Two features; the one that is masked first becomes the stronger one when the kept one is pulled to zero."""
    torch.manual_seed(0)
    down, up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
    down.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0, 0]])
    up.weight.data = torch.tensor([[1.0, 0], [0, 0.5], [0, 0], [0, 0]])
    settings = {"iterative_pruning": True, "rank_ratio": 0.5, "min_rank": 0, "max_iterations": 4, "rank_return": True}
    settings |= {"pruning_start": 0.0, "pruning_end": 1.0, "pruning_schedule": "linear"}
    session = TrainingSession({"pair": Pair("pair", down, up, 1.0)}, CompressionSettings.parse(settings), 40)
    optimizer = torch.optim.SGD([*down.parameters(), *up.parameters()], lr=0.2)
    history = []
    for _ in range(40):
        x = torch.eye(4)
        wanted = torch.diag(torch.tensor([0.0, 0.25, 0.0, 0.0]))
        optimizer.zero_grad()
        (up(down(x)).T - wanted).square().sum().backward()
        optimizer.step()
        history.append((session.kept("pair").tolist(), session.pairs["pair"].live_rows()[0][:, :2].abs().argmax(dim=1).tolist()))
    features = [{feature for kept, feature in zip(*entry, strict=True) if kept} for entry in history]
    assert features[-1] == {1}
    assert {0} in features or features[0] == {0, 1}


@pytest.mark.parametrize("strategy", [{"bits": 8}, {"bits": 2}, {"bits": 4, "strategy": "nf4", "group_size": 32}])
def test_the_gradient_is_that_of_the_weight_the_layer_computed_with(strategy: dict[str, Any]) -> None:
    net, session, optimizer = start(total=10, **{**QAT, "qat_start": 0.1, **strategy})
    train(net, optimizer, range(4))
    assert session.quantizing
    twin = copy.deepcopy(net)
    for name, pair in twin.pairs().items():
        for side, layer in enumerate((pair.down, pair.up)):
            layer.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear  # type: ignore[assignment]
            layer.weight.data = session.effective_weight(name, side).detach().clone()
            assert not torch.equal(layer.weight, session.pairs[name].weights[side])
    x, y = batch(0)
    for model in (net, twin):
        model.zero_grad()
        (model(x) - y).square().mean().backward()
    for mine, theirs in zip(net.parameters_of_pairs(), twin.parameters_of_pairs(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)  # type: ignore[arg-type]


def test_quantized_training_begins_when_it_should_and_learns() -> None:
    net, session, optimizer = start(total=200, **QAT)
    began = []
    losses = train(net, optimizer, range(200), lambda step: began.append(session.quantizing))
    assert began.index(True) == 99 and all(began[99:])
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert loss_of(net) < 1.25 * sum(losses[90:100]) / 10


def test_sessions_do_not_disturb_each_other_and_leave_no_hooks() -> None:
    gc.collect()
    hooks = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    first, second = start(**PRUNING), start(**PRUNING)
    train(first[0], first[2], range(7))
    assert (first[1].step, second[1].step) == (7, 0)
    first[1].close()
    train(first[0], first[2], range(2))
    assert first[1].step == 7
    del first, second
    gc.collect()
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == hooks


def test_a_closed_session_leaves_the_layers_as_they_were() -> None:
    net, session, optimizer = start(total=10, **{**QAT, "qat_start": 0.1})
    train(net, optimizer, range(3))
    before, layer = dict(net.first.down.__dict__), net.first.down
    assert type(layer) is not nn.Linear and not torch.equal(layer.weight, session.pairs["first"].weights[0])
    session.close()
    assert type(layer) is nn.Linear and layer.__dict__.keys() == before.keys() - {"_given_weight"}
    x = torch.randn(2, 12)
    assert torch.equal(net.first.down(x), torch.nn.functional.linear(x, net.first.down.weight))


def test_only_steps_that_were_made_count() -> None:
    net, session, optimizer = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for micro in range(6):  # accumulated over two, and the second of three steps overflows
        x, y = batch(micro)
        scaler.scale((net(x) - y).square().mean()).backward()
        if micro % 2:
            if micro == 3:
                net.first.up.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert session.step == 2


def test_two_optimizers_are_one_step() -> None:
    net, session, _ = start(total=10, pruning_start=0.1, pruning_end=0.3, **PRUNING)
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (net.conv.down, net.conv.up, net.first, net.second)]
    for step in range(5):
        x, y = batch(step)
        (net(x) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert session.step == 5 and sum(kept(session).values()) == 9


def test_state_keeps_its_numbers_when_a_network_is_cast_or_loaded() -> None:
    net, session, optimizer = start(total=20, **{**PRUNING, **QAT, "qat_start": 0.7, "importance": "sensitivity"})
    train(net, optimizer, range(16))
    before = {name: value.clone() for name, value in session.state.state_dict().items()}
    assert {"step", "quantizing", "kept", "sensitivity", "down_grid", "up_grid"} == before.keys()
    net.state = session.state
    net.half()
    assert all(torch.equal(value, before[name]) for name, value in session.state.state_dict().items())
    fresh = start(total=20, **{**PRUNING, **QAT, "importance": "sensitivity"})
    fresh[1].state.load_state_dict(before)
    assert fresh[1].step == 16 and fresh[1].quantizing and fresh[0].first.up.weight is not fresh[1].pairs["first"].weights[1]
    other = start(total=20, **PRUNING)
    other[1].state.load_state_dict({})  # of a training without compression
    assert other[1].step == 0


def test_what_cannot_be_trained_so_is_refused() -> None:
    with pytest.raises(SettingsError, match="no pair"):
        TrainingSession({}, CompressionSettings.parse(QAT), 10)
    with pytest.raises(FormatError, match="Embedding is no factor"):
        Pair("pair", nn.Embedding(3, 4), nn.Linear(4, 2, bias=False), 1.0)
    with pytest.raises(FormatError, match="Linear is no factor"):
        Pair("pair", nn.Linear(3, 4), nn.Linear(4, 2, bias=False), 1.0)
    with pytest.raises(FormatError, match="do not form one update"):
        Pair("pair", nn.Linear(3, 4, bias=False), nn.Linear(3, 2, bias=False), 1.0)


def test_a_network_that_never_asks_its_layers_is_not_said_to_be_quantized() -> None:
    net, _, optimizer = start(total=10, **{**QAT, "qat_start": 0.1})
    weights = [weight for pair in net.pairs().values() for weight in pair.weights]
    with pytest.raises(SettingsError, match="does not compute with the weights"):
        for _ in range(3):
            sum(weight.square().sum() for weight in weights).backward()  # type: ignore[union-attr]
            optimizer.step()
