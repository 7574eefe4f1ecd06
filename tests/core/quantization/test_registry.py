"""A codec from outside of the package: registered in a few lines, and used in every place that a strategy of ours is used in."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from lora_compress import (
    AdaptiveSettings,
    CompressionSettings,
    SettingsError,
    check_quantization_support,
    compress_file,
    load_lora,
    save,
)
from lora_compress.cli.main import main
from lora_compress.inspection.file import inspect_file
from lora_compress.packed.in_memory import packed_modules
from lora_compress.quantization import CODECS, DECODERS, STRATEGIES, FixedWidth, codec_of_levels, register
from lora_compress.settings import bits_table, read_toml
from lora_compress.training import TrainingSession
from lora_compress.training.controller import Compression, decide
from tests.core.samples import dense_file, kohya_file, relative_error
from tests.core.training.nets import Net, train

ROOT = Path(__file__).resolve().parents[3]
# The codec: 4 bits, levels closer to each other around zero, their distances in proportion to 1, 2, 3, ...
LEVELS = [*(-n * (n + 1) / 72 for n in range(8, 0, -1)), *(n * (n + 1) / 56 for n in range(8))]
OUTSIDE = FixedWidth("curved", {4: codec_of_levels("curved4", LEVELS)}, group_sizes=(32, 64), at_other_bits="dynamic")
SETTINGS = {"strategy": "curved", "bits": 4, "group_size": 32}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = [(table, dict(table)) for table in (STRATEGIES, DECODERS, CODECS)]
    register(OUTSIDE)
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return kohya_file(tmp_path / "source.safetensors")


def on_levels(rows: torch.Tensor) -> bool:
    """Whether each group of 32 weights of each row is one scale times levels of the codec."""
    for row in rows.double():
        for group in row.split(32):
            candidates = group.abs().max() / torch.tensor(sorted({abs(level) for level in LEVELS} - {0})).double()
            grids = candidates[:, None] * torch.tensor(LEVELS).double()
            distances = (group[None, :, None] - grids[:, None]).abs().amin(dim=2).amax(dim=1)
            if float(distances.min()) > 1e-6 * float(group.abs().max()):
                return False
    return True


def test_a_packed_file_holds_the_levels(source: Path, tmp_path: Path) -> None:
    report = compress_file(source, tmp_path / "packed.safetensors", CompressionSettings.parse(SETTINGS))
    updates = load_lora(tmp_path / "packed.safetensors").updates
    assert report.status == "written" and report.bytes[1] < 0.35 * report.bytes[0]
    assert all(on_levels(update.down_matrix) for update in updates.values())
    assert 0.01 < relative_error(updates, dense_file(source)) < 0.2
    assert inspect_file(tmp_path / "packed.safetensors").codec == "curved4"


def test_programs_that_read_into_memory_get_the_same(source: Path, tmp_path: Path) -> None:
    compress_file(source, tmp_path / "packed.safetensors", CompressionSettings.parse(SETTINGS))
    held = packed_modules(load_file(tmp_path / "packed.safetensors"))
    for name, update in load_lora(tmp_path / "packed.safetensors").updates.items():
        assert torch.equal(held[name].decode().down, update.down) and torch.equal(held[name].decode().up, update.up)


def test_the_node_of_comfyui_offers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: ModuleType(name) for name in ("comfy", "comfy.sd", "comfy.utils", "folder_paths")}
    modules["folder_paths"].get_filename_list = lambda kind: ["a.safetensors"]  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("comfyui_nodes", ROOT / "integrations/comfyui/nodes.py")
    assert spec is not None and spec.loader is not None
    nodes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nodes)
    offered = [kind.INPUT_TYPES()["required"].get("strategy") for kind in nodes.NODE_CLASS_MAPPINGS.values()]
    assert [choices[0] for choices in offered if choices] == [[*STRATEGIES, "none"]]
    assert "curved" in STRATEGIES


def test_the_command_line_and_a_configuration_file_take_it(source: Path, tmp_path: Path) -> None:
    flags = [word for name, value in SETTINGS.items() for word in ("--quantization", f"{name}={value}")]
    assert main(["--model", str(source), "--save_to", str(tmp_path / "a.safetensors"), *flags]) == 0
    (tmp_path / "c.toml").write_text('[quantization]\nstrategy = "curved"\nbits = 4\ngroup_size = 32\n')
    settings = CompressionSettings.parse(read_toml(str(tmp_path / "c.toml"))["quantization"])
    compress_file(source, tmp_path / "b.safetensors", settings)
    found = [load_file(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[1])


def test_a_size_and_an_error_choose_ranks_for_it(source: Path, tmp_path: Path) -> None:
    budget, settings = source.stat().st_size // 8, SETTINGS | {"min_rank": 1}
    small, close = tmp_path / "small.safetensors", tmp_path / "close.safetensors"
    compress_file(source, small, CompressionSettings.parse(settings | {"target_size": f"{budget}B"}))
    assert 0.9 * budget < small.stat().st_size <= budget
    compress_file(source, close, CompressionSettings.parse(settings | {"target_error": 0.2}))
    assert 0.17 < relative_error(load_lora(close).updates, dense_file(source)) <= 0.2


def test_a_training_computes_with_it_and_saves_it(tmp_path: Path) -> None:
    net = Net(6)
    session = TrainingSession(net.pairs(), CompressionSettings.parse(SETTINGS | {"qat": True, "qat_start": 0.0}), 12)
    train(net, torch.optim.AdamW(net.parameters_of_pairs(), lr=1e-2), range(12))
    layers = net.eval().first
    operand = layers.scale * layers.up.weight @ layers.down.weight
    save(session.compress(), tmp_path / "trained.safetensors")
    saved = load_lora(tmp_path / "trained.safetensors").updates["first"]
    assert on_levels(saved.down_matrix) and not on_levels(session.pairs["first"].live_rows()[0].detach())
    torch.testing.assert_close(saved.dense(), operand.detach().to(saved.dense().dtype))
    assert inspect_file(tmp_path / "trained.safetensors").codec == "curved4"


def test_the_controller_leaves_it_for_bits_that_it_does_not_have() -> None:
    history = [{"fid": fid} for fid in (50.0, 51.0, 52.0)]
    decision = decide(history, Compression(0.5, 4, "curved"), AdaptiveSettings(mode="fid_trend"))
    assert decision.compression.strategy == "dynamic" and decision.compression.bits == 6


def test_it_is_offered_and_refused_where_ours_are() -> None:
    assert "curved: 4" in bits_table()
    assert check_quantization_support()["curved"].bits == "4"
    for wrong, message in (
        ({"bits": 3}, "bits=3 with strategy=curved: allowed are .*curved: 4"),
        ({"group_size": 128}, "group_size=128: strategy=curved allows 32, 64"),
        ({"scale": 0.1}, "scale is only used by strategy=static, not by curved"),
        ({"progressive": True}, "progressive=true is only possible with strategy=entropy, not with curved"),
    ):
        with pytest.raises(SettingsError, match=message):
            CompressionSettings.parse(SETTINGS | wrong)


def test_nobody_asks_for_a_strategy_by_its_name() -> None:
    """What differs between strategies is said by the strategy's own object: see Strategy."""
    names = set(STRATEGIES) - {OUTSIDE.name}
    found = []
    for folder in ("lora_compress", "networks", "library", "integrations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare):
                    words = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
                    found += [f"{path}:{node.lineno}" for word in words & names]
    assert not found


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy curved: the name is taken"):
        register(OUTSIDE)
    with pytest.raises(ValueError, match="codec nf4: the name is taken"):
        register(FixedWidth("other", {4: codec_of_levels("nf4", LEVELS)}))
    assert "other" not in STRATEGIES and CODECS["nf4"].levels[0] == -1.0
