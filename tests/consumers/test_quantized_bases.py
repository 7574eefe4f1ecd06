"""LoRA on quantized base models: the output is that of the dequantized base with the update, and that of the base after removal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from consumers.conftest import TORCHAO_ELSEWHERE, absent
from consumers.pipelines import flux, linear_updates
from consumers.quantized import BASES, missing, outcome
from safetensors.torch import save_file

from lora_compress import SettingsError, as_kohya
from lora_compress.diffusers import load_lora


@pytest.fixture(autouse=True, scope="module")
def _importable() -> None:
    from library.compress_torchvision import declare_missing_operators

    declare_missing_operators()


CASES = [("bnb8", "SD", "packed"), ("bnb8", "FLUX", "fp8"), ("bnb4", "FLUX", "packed"), ("gguf", "FLUX", "packed")]
CASES += [(base, model, "packed") for base in ("quanto", "torchao") for model in ("SD", "FLUX")]


@pytest.mark.parametrize(("base", "model", "way"), CASES, ids=lambda value: str(value))
def test_a_lora_does_on_a_quantized_base_what_it_does_on_the_dequantized(base: str, model: str, way: str, tmp_path: Path) -> None:
    if package := missing(base):
        if package == "torchao":
            pytest.skip(TORCHAO_ELSEWHERE)
        absent(f"{package} is not installed")
    found = outcome(base, model, way, tmp_path)
    tolerance = BASES[base].tolerance
    assert found.change > 5 * tolerance
    assert max(found.loaded, found.swapped, found.removed) < tolerance


def test_libraries_that_do_not_fit_each_other_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT imports names of torchao that its newer releases have no more, whatever the base is."""
    import peft

    def broken(*_: Any, **__: Any) -> None:
        raise ImportError("cannot import name 'LinearActivationQuantizedTensor' from 'torchao.quantization'")

    pipe = flux()
    path = tmp_path / "lora.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(linear_updates(pipe)).items()}, path)
    monkeypatch.setattr(peft, "inject_adapter_in_model", broken)
    with pytest.raises(
        SettingsError, match=r"PEFT [\d.]+ and an installed library do not fit \(.*torchao.*\): upgrade PEFT, or uninstall"
    ):
        load_lora(pipe, path)
