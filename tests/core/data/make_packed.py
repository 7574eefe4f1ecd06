"""Write packed/*.safetensors and packed.json, packed files of every kind and what loading gives.

    python tests/core/data/make_packed.py

The files were written by the version before the core was put into rooms, commit 143d7ba, on torch 2.13 and Python 3.11. They stand
for files that people have, so a later version does not write them anew: run this again only to add a kind of file, and keep the old
ones. packed.json has type, shape and 32 digits of the SHA-256 of each tensor of `load_compressed_lora(path,
torch.float32)`, and the SHA-256 of what `expand_file` makes of the file in float32.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent
sys.path[:0] = [str(DATA.parents[2]), str(DATA.parents[1])]

import torch  # noqa: E402
from core.digests import digests, file_digest  # noqa: E402
from core.exact import integers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from lora_compress import (  # noqa: E402
    CompressionSettings,
    compress_file,
    expand_file,
    is_packed,
    load_compressed_lora,
    truncate_file,
)

TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
POINT = "lora_unet_mid_block_attentions_0_proj_in"
CARRIED = {"emb_params": torch.arange(6.0).reshape(2, 3), "count": torch.tensor([7])}
ENTROPY = {"bits": 3.5, "strategy": "entropy"}
Tensors = dict[str, Tensor]


def noise(*shape: int, seed: int) -> Tensor:
    """Nearly normal numbers in sixty-fourths, float32: four dice added."""
    count = torch.Size(shape).numel()
    rolled = torch.tensor(integers(4 * count, -32, 32, seed)).reshape(4, count).sum(dim=0)
    return (rolled / 64.0).reshape(shape)


def pair(name: str, outputs: int, inputs: int, rank: int, kernel: tuple[int, ...] = (), seed: int = 1) -> Tensors:
    """One module under kohya's keys, its components falling."""
    falling = (1.0 + torch.arange(rank)).reciprocal().view(-1, *[1] * (1 + len(kernel)))
    down, up = noise(rank, inputs, *kernel, seed=seed) * falling, noise(outputs, rank, *[1] * len(kernel), seed=seed + 1)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(rank / 2)}


def kohya() -> Tensors:
    """A text encoder's layer, a linear layer and two convolutions of a U-Net."""
    linear, point = pair(LINEAR, 40, 72, 6, seed=11), pair(POINT, 24, 24, 4, (1, 1), seed=21)
    return pair(TEXT, 30, 20, 4) | linear | pair(CONV, 16, 8, 4, (3, 3), seed=31) | point


def renamed(kind: str) -> Tensors:
    """Linear modules with the dotted names of diffusers, in the keys of PEFT or those before it."""
    down, up = {"peft": (".lora_A.weight", ".lora_B.weight"), "diffusers": (".lora.down.weight", ".lora.up.weight")}[kind]
    names = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (40, 24),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": (30, 20),
    }
    found = {}
    for seed, (name, (outputs, inputs)) in enumerate(names.items()):
        found |= {name + down: noise(4, inputs, seed=3 * seed + 40), name + up: noise(outputs, 4, seed=3 * seed + 41)}
    return found


def lycoris(kind: str) -> Tensors:
    """A module of LyCORIS beside a pair."""
    parts: dict[str, Tensors] = {
        "loha": {
            "hada_w1_a": noise(24, 2, seed=51),
            "hada_w1_b": noise(2, 20, seed=52),
            "hada_w2_a": noise(24, 2, seed=53),
            "hada_w2_b": noise(2, 20, seed=54),
            "alpha": torch.tensor(1.0),
        },
        "lokr": {"lokr_w1": noise(2, 2, seed=55), "lokr_w2_a": noise(12, 2, seed=56), "lokr_w2_b": noise(2, 10, seed=57)},
        "full": {"diff": noise(24, 3, seed=58) @ noise(3, 20, seed=59)},
        "bias": {"diff": noise(24, 3, seed=58) @ noise(3, 20, seed=59), "diff_b": noise(24, seed=60)},
        "glora": {
            "a1.weight": noise(20, 3, seed=61),
            "a2.weight": torch.zeros(3, 20),
            "b1.weight": noise(24, 3, seed=62),
            "b2.weight": noise(3, 20, seed=63),
        },
        "mid": {
            "lora_down.weight": noise(3, 8, 1, 1, seed=64),
            "lora_mid.weight": noise(3, 3, 3, 3, seed=65),
            "lora_up.weight": noise(16, 3, 1, 1, seed=66),
            "alpha": torch.tensor(3.0),
        },
    }
    name = CONV if kind == "mid" else LINEAR
    return {f"{name}.{part}": tensor for part, tensor in parts[kind].items()} | pair(TEXT, 30, 20, 4)


def files() -> Iterator[tuple[str, Tensors, dict[str, Any]]]:
    """Name, tensors of the source and settings of every file."""
    for bits in (2, 3, 4, 5, 6, 8):
        yield f"int{bits}", kohya(), {"bits": bits}
    yield "int4_groups_of_1024", kohya(), {"bits": 4, "group_size": 1024, "rank_ratio": 0.5, "min_rank": 1}
    for bits in (2, 8):
        yield f"static{bits}", kohya(), {"bits": bits, "strategy": "static"}
    yield "nf4", kohya(), {"bits": 4, "strategy": "nf4"}
    yield "mixed", kohya(), {"bits": 4.2, "strategy": "mixed"}
    yield "entropy", kohya(), ENTROPY
    yield "entropy_unrefined", kohya(), {**ENTROPY, "refine": False}
    yield "entropy_of_a_size", kohya(), {"target_size": "2500", "strategy": "entropy"}
    yield "progressive", kohya(), {**ENTROPY, "progressive": True}
    yield "int8_channels", kohya(), {"bits": 8, "channel_threshold": 0.9}
    yield "entropy_channels", kohya(), {**ENTROPY, "channel_threshold": 0.9}
    yield "progressive_channels", kohya(), {**ENTROPY, "progressive": True, "channel_threshold": 0.9}
    yield "int4_fewer_modules", kohya(), {"bits": 4, "layer_threshold": 0.2, "new_rank": 3}
    yield "int4_carried", kohya() | CARRIED | {f"{POINT}.dora_scale": noise(24, 1, 1, 1, seed=70)}, {"bits": 4}
    yield "entropy_carried", kohya() | CARRIED, ENTROPY
    yield "int6_both", kohya() | CARRIED, {"bits": 6, "save_format": "both"}
    yield "int4_of_peft", renamed("peft"), {"bits": 4}
    yield "entropy_of_peft", renamed("peft"), ENTROPY
    yield "nf4_of_diffusers", renamed("diffusers"), {"bits": 4, "strategy": "nf4"}
    for kind in ("loha", "lokr", "full", "bias", "glora", "mid"):
        yield f"int5_of_{kind}", lycoris(kind), {"bits": 5}
    yield "progressive_of_loha", lycoris("loha"), {**ENTROPY, "progressive": True}
    yield "fp8", kohya(), {"save_format": "fp8", "new_rank": 2}


def record(path: Path) -> dict[str, Any]:
    """What loading and expanding a file gives."""
    found: dict[str, Any] = {"tensors": digests(load_compressed_lora(path, torch.float32))}
    if is_packed(path):
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "plain.safetensors"
            expand_file(path, plain, save_dtype=torch.float32)
            found["expanded"] = file_digest(plain)
    return found


def main() -> None:
    """Write every file that is not there yet, and the record of all."""
    folder = DATA / "packed"
    for name, tensors, values in files():
        target = folder / f"{name}.safetensors"
        if target.exists():
            continue
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / "source.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, source, {"ss_network_dim": "4"})
            settings = CompressionSettings.parse({"allow_larger": True, **values})
            assert compress_file(source, target, settings).status == "written", name
    cut = folder / "progressive_cut.safetensors"
    if not cut.exists():
        whole = folder / "progressive.safetensors"
        truncate_file(whole, cut, whole.stat().st_size * 3 // 4)
    found = {path.stem: record(path) for path in sorted(folder.glob("*.safetensors"))}
    (DATA / "packed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
