"""A fresh process: what a packed LoRA loses of the full one's effect on the U-Net's output. Prints the share, as JSON.

python compare_outputs.py MODEL PACKED FULL
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import networks.sd_scripts_path  # noqa: F401

# isort: split
import torch
from diffusers import UNet2DConditionModel

from networks import lora_compress as module


def main(model: str, packed: str, full: str) -> None:
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    noisy, text = (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator),
    )

    @torch.no_grad()
    def predict() -> torch.Tensor:
        return unet(noisy, torch.tensor([500]), text).sample

    outputs = [predict()]
    for file in (packed, full):
        network, weights = module.create_network_from_weights(1.0, file, None, torch.nn.Module(), unet, for_inference=True)
        network.apply_to(None, unet, apply_text_encoder=False)
        network.load_state_dict(weights, False)
        outputs.append(predict())
        network.set_multiplier(0.0)
        assert torch.equal(predict(), outputs[0])
    base, compressed, whole = outputs
    print(json.dumps(float((compressed - whole).norm() / (whole - base).norm())))


if __name__ == "__main__":
    main(*sys.argv[1:])
