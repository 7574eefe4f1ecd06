"""What this machine can do is told per strategy, with the reason where it cannot."""

from __future__ import annotations

import sys

import pytest
import torch

from lora_compress import QuantizationSettings
from lora_compress.quantization import check_quantization_support
from lora_compress.settings import bits_table


def test_every_strategy_is_told_with_its_bits() -> None:
    support = check_quantization_support()
    for strategy in ("dynamic", "static", "nf4", "mixed", "entropy"):
        assert QuantizationSettings(4, strategy).problems() == []
        assert f"{strategy}: {support[strategy].bits}" in bits_table()
        assert support[strategy].available == (not support[strategy].reason)
    assert all(support[strategy].available for strategy in ("dynamic", "static", "nf4", "mixed"))


@pytest.mark.parametrize(("name", "module"), [("entropy", "constriction"), ("bitsandbytes", "bitsandbytes")])
def test_what_is_not_installed_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    found = check_quantization_support()[name]
    assert not found.available
    assert ("pip install constriction" if name == "entropy" else "not installed") in found.reason


@pytest.mark.parametrize("cuda", [True, False])
def test_cuda_is_what_torch_says(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    found = check_quantization_support()["cuda"]
    assert found.available == cuda
    assert ("quantization_device=cpu" in found.reason) == (not cuda)
