"""What is saved is what was trained: to the last bit after quantization-aware training, the surviving components otherwise."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_compress import CompressionSettings, SettingsError, expand_file, kohya_partner, load_lora, save
from lora_compress.training import TrainingSession, find_pairs
from tests.core.training.nets import Net, batch, train

ROOT = Path(__file__).resolve().parents[3]
STRATEGIES: dict[str, dict[str, Any]] = {
    **{f"int{bits}": {"bits": bits} for bits in (8, 6, 5, 4, 3, 2)},
    "nf4": {"bits": 4, "strategy": "nf4", "group_size": 32},
    "static": {"bits": 8, "strategy": "static"},
    "entropy": {"bits": 3.5, "strategy": "entropy"},
}


class _Operands(TorchFunctionMode):
    """Remembers the weights that linear and convolution layers were computed with, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.nn.functional.linear, torch.nn.functional.conv2d):
            self.seen.append(args[1].detach().clone())
        return function(*args, **(kwargs or {}))


def operands(net: Net) -> dict[str, tuple[Tensor, Tensor]]:
    """The weights that down and up of each module compute with in an evaluation forward, by rows of components."""
    net.eval()
    with _Operands() as mode, torch.no_grad():
        net(batch(0)[0])
    found, calls = {}, iter(mode.seen)
    for name in ("conv", "first", "second"):
        next(calls)  # of the frozen layer
        found[name] = next(calls).flatten(1), next(calls).flatten(1).T
    return found


def decode(file: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """What a fresh process makes of a file."""
    out = file.with_suffix(".pt")
    script = str(Path(__file__).with_name("decode.py"))
    done = subprocess.run(
        [sys.executable, script, str(file), str(out)], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def trained(**values: Any) -> tuple[Net, TrainingSession]:
    net = Net(rank=6)
    session = TrainingSession(net.pairs(), CompressionSettings.parse(values), 30)
    train(net, torch.optim.AdamW(net.parameters_of_pairs(), lr=1e-2), range(30))
    return net, session


def strongest_first(rows: tuple[Tensor, Tensor], kept: Tensor) -> list[Tensor]:
    order = torch.argsort((rows[0].double().norm(dim=1) * rows[1].double().norm(dim=1))[kept], descending=True, stable=True)
    return [part[kept][order] for part in rows]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_file_decodes_to_the_operands_of_the_last_forward(strategy: str, tmp_path: Path) -> None:
    """In this process for every codec; in a fresh one below."""
    pruning = {"iterative_pruning": True, "rank_ratio": 0.5, "min_rank": 1}
    net, session = trained(qat=True, qat_start=0.3, **STRATEGIES[strategy], **pruning)
    _assert_exact(net, session, tmp_path, lambda file: {n: (u.down, u.up, u.scale) for n, u in load_lora(file).updates.items()})


@pytest.mark.parametrize("strategy", ["int4", "nf4", "entropy"])
def test_a_fresh_process_decodes_the_operands_of_the_last_forward(strategy: str, tmp_path: Path) -> None:
    net, session = trained(qat=True, **STRATEGIES[strategy])
    _assert_exact(net, session, tmp_path, decode)


def _assert_exact(net: Net, session: TrainingSession, folder: Path, read: Any) -> None:
    used = operands(net)
    lora = session.compress()
    save(lora, folder / "lora.safetensors")
    decoded = read(folder / "lora.safetensors")
    assert decoded.keys() == {name for name in used if session.kept(name).any()}
    for name, (down, up, scale) in decoded.items():
        expected = strongest_first(used[name], session.kept(name))
        assert scale == session.pairs[name].scale == 0.5
        assert torch.equal(down.flatten(1), expected[0])
        assert torch.equal(up.flatten(1).T, expected[1])
        assert not torch.equal(expected[0], strongest_first(session.pairs[name].live_rows(), session.kept(name))[0])
    total = lora.report.total
    assert total.relative_error == 0.0  # of saving: the file holds what the layers compute with
    lost = norm = 0.0
    for name, pair in session.pairs.items():
        whole = pair.update().dense().double()
        written = lora.updates[name].dense().double() if name in lora.updates else torch.zeros_like(whole)
        lost, norm = lost + float((whole - written).square().sum()), norm + float(whole.square().sum())
    assert total.trained_error == pytest.approx((lost / norm) ** 0.5, rel=1e-4) and total.trained_error > 0.001
    assert lora.metadata["ss_compress_relative_error"] == f"{total.trained_error:.6e}"
    assert lora.report.metrics()["compress/relative_error"] == total.trained_error
    assert f"{total.trained_error:.2%}" in str(lora.report) and "of saving" in str(lora.report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("save_format", ["kohya", "both"])
def test_plain_files_hold_the_same_operands_in_the_save_precision(dtype: Any, save_format: str, tmp_path: Path) -> None:
    net, session = trained(qat=True, bits=4, save_format=save_format, iterative_pruning=True, rank_ratio=0.4, min_rank=1)
    used = operands(net)
    file = tmp_path / "lora.safetensors"
    save(session.compress(dtype), file, dtype)
    plain = load_lora(kohya_partner(file) if save_format == "both" else file)
    for name, update in plain.updates.items():
        expected = strongest_first(used[name], session.kept(name))
        rank = len(expected[0])
        assert update.down.dtype == (dtype or torch.float32)
        assert torch.equal(update.down_matrix[:rank], expected[0].to(update.down.dtype))
        assert torch.equal(update.up_matrix.T[:rank], expected[1].to(update.up.dtype))
        assert not update.down_matrix[rank:].any() and update.scale == pytest.approx(0.5)
        assert update.rank == max(rank, 2)


def test_an_expanded_file_does_the_same(tmp_path: Path) -> None:
    _, session = trained(qat=True, bits=4)
    save(session.compress(), tmp_path / "lora.safetensors")
    expand_file(str(tmp_path / "lora.safetensors"), str(tmp_path / "plain.safetensors"))
    packed, plain = (load_lora(tmp_path / f"{name}.safetensors").updates for name in ("lora", "plain"))
    for name, update in packed.items():
        assert update.scale == 0.5 and plain[name].alpha == 1.0
        assert torch.allclose(plain[name].dense(), update.dense(), rtol=0, atol=2e-3 * float(update.dense().abs().max()))


@pytest.mark.parametrize("returning", [False, True])
@pytest.mark.parametrize("values", [{"save_format": "kohya"}, {"bits": 8}], ids=["plain", "int8"])
def test_without_qat_the_survivors_are_saved_and_nothing_else_is_lost(returning: bool, values: dict[str, Any]) -> None:
    _, session = trained(iterative_pruning=True, rank_ratio=0.5, min_rank=1, rank_return=returning, **values)
    lora = session.compress(metadata={"ss_network_dim": "6"})
    assert sum(update.rank for update in lora.updates.values()) == sum(int(session.kept(name).sum()) for name in session.pairs) == 9
    assert lora.report.total.components == (18, 9)
    for name, update in lora.updates.items():
        down, up = (session.effective_weight(name, side).detach().double().flatten(1) for side in (0, 1))
        live = 0.5 * up @ down
        assert float((update.dense() - live).norm() / live.norm()) < (0.02 if "bits" in values else 1e-6)
    assert lora.metadata["ss_compress_rank_ratio"] == "0.5" and lora.metadata["ss_compress_iterative_pruning"] == "true"


def test_other_settings_still_apply_to_a_pruned_network() -> None:
    _, session = trained(iterative_pruning=True, rank_ratio=0.5, min_rank=1, target_error=0.5, bits=8)
    assert sum(update.rank for update in session.compress().updates.values()) < 9


def test_a_checkpoint_before_quantization_began_is_compressed_as_without_it() -> None:
    net = Net()
    session = TrainingSession(net.pairs(), CompressionSettings.parse({"qat": True, "bits": 4, "qat_start": 0.9}), 30)
    train(net, torch.optim.AdamW(net.parameters_of_pairs(), lr=1e-2), range(5))
    assert not session.quantizing
    lora = session.compress()
    assert 0.0 < lora.report.total.relative_error < 0.2
    assert lora.metadata["lora_compress_format"] == "1"


class _Split(nn.Module):
    """What sd-scripts makes of a fused projection under split_qkv."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.lora_name, self.scale = "qkv", 0.25
        self.lora_down = nn.ModuleList([nn.Linear(10, 4, bias=False) for _ in sizes])
        self.lora_up = nn.ModuleList([nn.Linear(4, size, bias=False) for size in sizes])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([up(down(x)) for down, up in zip(self.lora_down, self.lora_up, strict=True)], dim=-1) * self.scale


@pytest.mark.parametrize("strategy", ["int4", "nf4", "static", "entropy"])
def test_parts_of_a_split_module_are_saved_as_one_that_does_the_same(strategy: str) -> None:
    torch.manual_seed(0)
    net = _Split([32, 32, 64])
    settings = CompressionSettings.parse({"qat": True, "qat_start": 0.2, **STRATEGIES[strategy]} | {"save_format": "packed"})
    if strategy == "int4":
        settings = CompressionSettings.parse({"qat": True, "qat_start": 0.2, "bits": 4, "group_size": 32})
    session = TrainingSession(find_pairs(net), settings, 10)
    assert list(session.pairs) == ["qkv.0", "qkv.1", "qkv.2"]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        net(torch.ones(1, 10)).square().mean().backward()
        optimizer.step()
    (update,) = session.compress().updates.values()
    x = torch.randn(5, 10)
    assert update.rank == 12
    with torch.no_grad():
        expected = net(x).double()
    assert torch.allclose(x.double() @ update.dense().T, expected, atol=1e-6)


def test_parts_that_blocks_do_not_fit_are_refused() -> None:
    net = _Split([40, 64])
    session = TrainingSession(find_pairs(net), CompressionSettings.parse({"qat": True, "bits": 4}), 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(4):
        net(torch.ones(1, 10)).square().mean().backward()
        optimizer.step()
    with pytest.raises(SettingsError, match="group_size=64 does not divide"):
        session.compress()


def test_pairs_of_peft_are_found() -> None:
    runpy.run_path(str(ROOT / "library" / "compress_torchvision.py"))["declare_missing_operators"]()
    import peft

    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    network = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0", "2"]))
    pairs = find_pairs(network)
    assert [(pair.rank, pair.scale) for pair in pairs.values()] == [(4, 0.5), (4, 0.5)]
    session = TrainingSession(pairs, CompressionSettings.parse({"qat": True, "bits": 4, "qat_start": 0.1}), 20)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        network(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
    x = torch.randn(3, 8)
    with torch.no_grad():
        first = network.base_model.model[0]
        added = first(x) - first.base_layer(x)
    update = session.compress().updates[next(iter(pairs))]
    assert torch.allclose(x.double() @ update.dense().T, added.double(), atol=1e-6)
