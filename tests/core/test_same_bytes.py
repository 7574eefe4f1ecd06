"""The same settings give the same bytes as when data/outputs.json was made, whatever processor and however many threads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from core.digests import file_digest, told_error
from core.exact import exact_rows
from core.runs import CLOSE, RUNS

from lora_compress import load_lora

DATA = Path(__file__).with_name("data")
OUTPUTS = json.loads((DATA / "outputs.json").read_text(encoding="utf-8"))


def test_every_run_is_recorded() -> None:
    assert [name for name in RUNS if name != CLOSE] == list(OUTPUTS)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_run_writes_the_bytes_that_are_recorded(name: str, tmp_path: Path) -> None:
    paths = RUNS[name].files(tmp_path)
    assert [path.name for path in paths] == list(OUTPUTS[name])
    for path in paths:
        size, error, digest = OUTPUTS[name][path.name]
        assert path.stat().st_size == size
        assert told_error(path) == (None if error is None else pytest.approx(error, rel=1e-6))
        assert file_digest(path) == digest


def test_a_step_that_is_searched_for_is_the_same_to_six_digits(tmp_path: Path) -> None:
    """Its index holds that step in full, whose last digits depend on the processor: tensors and metadata are compared."""
    (path,) = RUNS[CLOSE].files(tmp_path)
    found, recorded = load_lora(path), load_lora(DATA / "close.safetensors")
    hashes = {"sshs_model_hash", "sshs_legacy_hash", "ss_compress_relative_error"}
    assert {k: v for k, v in found.metadata.items() if k not in hashes} == {
        k: v for k, v in recorded.metadata.items() if k not in hashes
    }
    assert abs(path.stat().st_size - (DATA / "close.safetensors").stat().st_size) <= 8
    assert told_error(path) == pytest.approx(told_error(DATA / "close.safetensors"), rel=1e-6)
    assert list(found.updates) == list(recorded.updates) and found.others.keys() == recorded.others.keys()
    for name, update in recorded.updates.items():
        torch.testing.assert_close(found.updates[name].down, update.down, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(found.updates[name].up, update.up, rtol=1e-6, atol=0.0)
        assert found.updates[name].alpha == pytest.approx(update.alpha, rel=1e-6)


@pytest.mark.parametrize("size", [20, 64, 72, 96, 100])
def test_the_rows_of_the_sources_are_orthogonal_to_the_last_bit(size: int) -> None:
    rows = exact_rows(8, size, seed=1)
    norm = 4.0 ** ((size.bit_length() - 1) // 2)
    assert np.array_equal(rows @ rows.T, norm * np.eye(8))
    assert len(np.unique(np.abs(rows))) > 8
