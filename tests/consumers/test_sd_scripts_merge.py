"""sd-scripts' merging scripts on expanded files, and on packed ones by `run`: they make the update that the packed file holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from core.factories import dense, random_update
from safetensors.torch import save_file

from lora_compress import CompressionSettings, LowRankUpdate, as_kohya, load_lora
from lora_compress.cli.main import main
from lora_compress.engine.in_memory import compress, save

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {  # and where a module of their model family may be
    "merge_lora": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "sdxl_merge_lora": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "svd_merge_lora": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "flux_merge_lora": "lora_unet_double_blocks_0_img_attn_proj",
}
RUN_ALL = """
import json, sys
from library.compress_torchvision import declare_missing_operators
declare_missing_operators()
import networks.sd_scripts_path
from lora_compress.cli.main import main
folder, runs = sys.argv[1], json.loads(sys.argv[2])
for script, arguments in runs:
    assert main(["run", f"{folder}/{script}.py", *arguments]) == 0
"""


def updates(module: str) -> dict[str, LowRankUpdate]:
    names = (module, module.replace("blocks_0", "blocks_1"), "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    return {name: random_update(4 + seed, 24, 16, (), 3.0, seed) for seed, name in enumerate(names)}


def test_packed_and_expanded_files_can_be_merged(sd_scripts: Path, tmp_path: Path) -> None:
    """As a plain file of the same update is, made without us: two of the scripts have their own ways with ratios and outliers."""
    runs = []
    for script, module in SCRIPTS.items():
        packed, plain, other = (tmp_path / f"{script}-{what}.safetensors" for what in ("packed", "plain", "other"))
        save(compress(updates(module), CompressionSettings.parse({"bits": 4, "save_format": "packed"})), packed)
        assert main(["expand", "--model", str(packed), "--save_to", str(plain), "--save_precision", "float"]) == 0
        decoded = as_kohya(dict(load_lora(packed).updates))
        save_file({key: tensor.float().contiguous() for key, tensor in decoded.items()}, other)
        for path in (packed, plain, other):
            more = ["--new_rank", "16"] if script == "svd_merge_lora" else ["--precision", "float"]
            merged = str(path.with_suffix(".merged.safetensors"))
            arguments = ["--models", str(path), "--ratios", "0.5", "--save_to", merged, "--save_precision", "float", *more]
            runs.append((script, arguments))
    command = [sys.executable, "-c", RUN_ALL, str(sd_scripts / "networks"), json.dumps(runs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SD_SCRIPTS_DIR": str(sd_scripts)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for script in SCRIPTS:
        direct, ours, theirs = (
            load_lora(tmp_path / f"{script}-{what}.merged.safetensors").updates for what in ("packed", "plain", "other")
        )
        assert len(ours) == 3 and ours.keys() == theirs.keys() == direct.keys()
        for name, update in theirs.items():
            largest = float(dense(update).abs().max())
            assert largest > 0.01
            torch.testing.assert_close(dense(ours[name]), dense(update), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(dense(direct[name]), dense(update), rtol=1e-3, atol=2e-3 * largest)  # of float16 factors
