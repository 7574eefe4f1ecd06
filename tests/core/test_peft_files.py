"""Files of PEFT keep a configuration that is true: ranks of the file that holds it, scales of 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_compress import CompressionSettings, compress_file, expand_file


def peft_file(folder: Path) -> Path:
    """Two modules of rank 8, one three times as strong as the other, alpha 16."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    falling = torch.logspace(0, -2, 8).unsqueeze(1)
    for name, strength in (("strong", 3.0), ("weak", 1.0)):
        tensors[f"unet.{name}.to_q.lora_A.weight"] = torch.randn(8, 64, generator=generator) * falling * strength
        tensors[f"unet.{name}.to_q.lora_B.weight"] = torch.randn(48, 8, generator=generator)
    config = {"unet.r": 8, "unet.lora_alpha": 16, "unet.target_modules": ["to_q"]}
    save_file(tensors, folder / "in.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    return folder / "in.safetensors"


@pytest.mark.parametrize("values", [{"rank_ratio": 0.5, "min_rank": 1}, {"bits": 4, "rank_ratio": 0.5, "min_rank": 1}], ids=str)
def test_the_configuration_tells_the_ranks_of_the_file_that_holds_it(values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    compress_file(peft_file(tmp_path), path, CompressionSettings.parse(values))
    if "bits" in values:
        expand_file(path, path, force=True)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
        ranks = {name: len(file.get_tensor(f"unet.{name}.to_q.lora_A.weight")) for name in ("strong", "weak")}
    assert ranks["strong"] != ranks["weak"] and sum(ranks.values()) == 8
    told = {name: config["unet.rank_pattern"].get(f"{name}.to_q", config["unet.r"]) for name in ranks}
    assert told == ranks
    assert {name: config["unet.alpha_pattern"].get(f"{name}.to_q", config["unet.lora_alpha"]) for name in ranks} == ranks
