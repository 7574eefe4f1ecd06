"""Any LoRA file in any format: what the report says is true, and nothing else has changed. Results are read by another process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from core.layouts.files import PAIRS, random, save
from core.samples import CARRIED, CODECS, LAYOUTS, sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from lora_compress import CompressionSettings, SettingsError, open_lora
from lora_compress.engine.to_file import compress_file
from lora_compress.engine.unpack import expand_file
from lora_compress.report.file_report import FileReport

ROOT = Path(__file__).resolve().parents[2]
PLAIN: dict[str, dict[str, object]] = {
    "as it is": {},
    "rank 2": {"new_rank": 2},
    "half the ranks": {"rank_ratio": 0.5, "min_rank": 1},
    "rank 1": {"new_rank": 1},
    "int4 in kohya": {"bits": 4, "save_format": "kohya"},
    "entropy in kohya": {"bits": 5, "strategy": "entropy", "save_format": "kohya"},
    "mixed in kohya": {"bits": 4, "strategy": "mixed", "save_format": "kohya"},
    "plain channels": {"channel_threshold": 0.5},
    "fp8": {"save_format": "fp8"},
}
FORMATS = (
    PLAIN | CODECS | {"both": {"bits": 6, "save_format": "both"}, "progressive, few bits": {"bits": 1.5, "strategy": "entropy"}}
)
READER = """
import sys, traceback, torch
torch.set_num_threads(1)
from lora_compress import load_lora
for line in sys.stdin:
    path = line.strip()
    try:
        lora = load_lora(path)
        dense = {n: u.alpha / len(u.down) * u.up.double().flatten(1) @ u.down.double().flatten(1) for n, u in lora.updates.items()}
        shapes = {n: (u.rank, u.alpha, tuple(u.down.shape[1:])) for n, u in lora.updates.items()}
        torch.save((dense, shapes, lora.others, lora.metadata), path + ".read")
        print("read", flush=True)
    except Exception:
        print(repr(traceback.format_exc()), flush=True)
"""


@pytest.fixture(scope="module")
def reader() -> Iterator[subprocess.Popen[str]]:
    """A process that has never seen how the files are made."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READER]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def ask(reader: subprocess.Popen[str], path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Dense updates, (rank, alpha, shape), other tensors and metadata, as the other process finds them."""
    assert reader.stdin is not None and reader.stdout is not None
    print(path, file=reader.stdin, flush=True)
    answer = reader.stdout.readline().strip()
    assert answer == "read", answer
    return torch.load(f"{path}.read", weights_only=True)


@st.composite
def loras(draw: st.DrawFn) -> tuple[str, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A layout, the tensors of a file, the dense updates that they stand for, and the tensors that belong to none."""
    layout = draw(st.sampled_from(LAYOUTS))
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    others = dict(CARRIED) if draw(st.booleans()) else {}
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]))
    for index in range(draw(st.integers(1, 3))):
        name = f"lora_unet_some_layer_{index}"
        outputs, inputs, rank = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 12))
        if layout == "glora":  # which has two spellings that only sizes tell apart
            outputs, inputs = outputs + rank, inputs + 2 * rank
        kernel = () if layout in ("lokr", "glora") else draw(st.sampled_from([(), (), (1, 1), (3, 3), (3,), (1, 2, 2)]))
        alpha = draw(st.sampled_from([None, 0.0, 1.0, 7.0, -3.0, 1e-6]))
        magnitude = draw(st.sampled_from([0.3, 1e-3, 30.0]))
        made, expected[name] = sample(
            layout, name, outputs, inputs, rank, kernel, alpha, dtype, draw(st.integers(0, 99)), magnitude
        )
        tensors |= made
        if draw(st.booleans()):
            others[f"{name}.dora_scale"] = random(len(expected[name]), 1, seed=index).bfloat16()
    return layout, tensors, expected, others


@settings(
    max_examples=int(os.environ.get("LORA_COMPRESS_EXAMPLES", "60")), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    lora=loras(),
    form=st.sampled_from(sorted(FORMATS)),
    precision=st.sampled_from([None, torch.float32, torch.float16]),
    larger=st.booleans(),
)
def test_any_file_in_any_format(reader, lora, form, precision, larger) -> None:
    layout, tensors, expected, others = lora
    values = FORMATS[form]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, target = save({**tensors, **others}, folder, {"ss_network_dim": "4", "ss_note": "é"}), folder / "out.safetensors"
        before = source.read_bytes()
        chosen = CompressionSettings.parse({**values, "allow_larger": larger})
        without_alpha = any(not end.endswith("alpha") and PAIRS.get(layout, ("kohya",))[0] != "kohya" for end in tensors)
        if form == "fp8" and without_alpha:
            with pytest.raises(SettingsError, match="alpha beside its factors"):
                compress_file(source, target, chosen, save_dtype=precision)
            return
        try:
            report = compress_file(source, target, chosen, save_dtype=precision)
        except SettingsError as error:  # a budget of a few bits in a few bytes
            assert chosen.quantization.averages and sum(tensor.numel() for tensor in tensors.values()) < 2000, error
            return
        assert source.read_bytes() == before
        assert report.bytes[0] == len(before)
        if report.status == "not_smaller":
            assert not larger
            assert report.output is None and not target.exists()
            assert report.bytes[1] >= report.bytes[0]
            return
        assert report.bytes[1] == target.stat().st_size
        assert larger or report.bytes[1] < report.bytes[0]
        dense, shapes, found, metadata = ask(reader, target)
        check_updates(report, dense, expected)
        check_carried(found, {key: tensor for key, tensor in others.items() if key in CARRIED or key.rpartition(".")[0] in dense})
        check_metadata(target, metadata, shapes)
        if chosen.save_format in ("kohya", "fp8"):
            check_drop_in(shapes, without_alpha)
        else:
            check_expanded(reader, target, tensors, dense, others, PAIRS.get(layout, ("kohya",))[0])


def check_updates(report: FileReport, dense: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Errors of every module and of the whole as the report has them; modules that are gone count as zero."""
    assert [module.name for module in report.modules] == [*expected]
    whole_lost = whole_norm = 0.0
    for module in report.modules:
        matrix = expected[module.name]
        assert (module.name in dense) == (module.rank[1] > 0)
        assert module.shape[0] == len(matrix) and torch.Size(module.shape[1:]).numel() == matrix.shape[1]
        lost = float((matrix - dense.get(module.name, torch.zeros_like(matrix))).norm())
        norm = float(matrix.norm())
        assert abs(module.squared_norm**0.5 - norm) <= 1e-6 * norm
        assert abs(module.squared_error**0.5 - lost) <= 1e-3 * lost + 1e-6 * norm, (
            module.name,
            module.squared_error**0.5,
            lost,
            norm,
        )
        whole_lost, whole_norm = whole_lost + lost**2, whole_norm + norm**2
    if whole_norm:
        error = (whole_lost / whole_norm) ** 0.5
        assert abs(report.relative_error - error) <= 1e-3 * error + 1e-6


def check_carried(found: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """To the bit."""
    assert found.keys() == others.keys()
    for key, tensor in others.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def check_metadata(path: Path, metadata: dict[str, str], shapes: dict[str, tuple[int, float, tuple[int, ...]]]) -> None:
    """The hashes are those that sd-scripts would take, by safetensors' own writer; ss_network_dim is true."""
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    own = to_bytes(load_file(path), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    data = path.read_bytes()
    assert metadata["sshs_model_hash"] == hashlib.sha256(own[8 + int.from_bytes(own[:8], "little") :]).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]  # these files are smaller
    ranks = {rank for rank, _, _ in shapes.values()}
    assert metadata["ss_network_dim"] == (str(ranks.pop()) if len(ranks) == 1 else "Dynamic")
    assert metadata["ss_note"] == "é"
    assert json.loads(metadata["ss_compress_modules"].split("/")[0]) == len(shapes)


def check_drop_in(shapes: dict[str, tuple[int, float, tuple[int, ...]]], without_alpha: bool) -> None:
    """Rank 2 at least, one positive alpha for the file."""
    assert all(rank >= 2 for rank, _, _ in shapes.values())
    if without_alpha:
        assert all(alpha == rank for rank, alpha, _ in shapes.values())
    else:
        assert len({alpha for _, alpha, _ in shapes.values()}) == 1
        assert all(alpha > 0 for _, alpha, _ in shapes.values())


def check_expanded(reader, packed: Path, tensors, dense: dict[str, Tensor], others: dict[str, Tensor], layout: str) -> None:
    """A plain file of the same layout and the same update within what float16 rounds."""
    target = packed.with_name("expanded.safetensors")
    report = expand_file(packed, target, save_dtype=None)
    assert report.bytes == (packed.stat().st_size, target.stat().st_size)
    again, shapes, found, metadata = ask(reader, target)
    with open_lora(target) as source:
        assert source.layout == layout
    assert again.keys() == dense.keys()
    for name, matrix in dense.items():
        assert float((again[name] - matrix).norm()) <= 1e-3 * float(matrix.norm()) + 1e-7, name
    check_carried(found, {key: tensor for key, tensor in others.items() if key in CARRIED or key.rpartition(".")[0] in dense})
    check_metadata(target, metadata, shapes)
    check_drop_in(shapes, layout != "kohya")
    if layout != "kohya":
        names = tuple(dense)
        assert {key for key in load_file(target) if key not in found} == {
            key for key in tensors if key.startswith(names) and not key.endswith(".alpha")
        }
