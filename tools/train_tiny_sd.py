"""Trains tiny-sd, a Stable Diffusion 1.x model in miniature, and the probe that reads its pictures, from scratch on drawn shapes.

Four stages: tokenizer, probe, autoencoder, U-Net with text encoder. Each saves checkpoints in the work folder: started again, the
training goes on where it was. It needs nothing that is downloaded, and two CPU cores for about 70 minutes (90 on a busy machine).

    python tools/train_tiny_sd.py --output assets/tiny-sd
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # beside any other load, spinning threads make a step a hundred times slower

from library.compress_torchvision import declare_missing_operators  # noqa: E402

declare_missing_operators()

import torch  # noqa: E402
from tiny_sd.export import save_pipeline, save_probe  # noqa: E402
from tiny_sd.probe import train_probe  # noqa: E402
from tiny_sd.tokenizer import write_tokenizer  # noqa: E402
from tiny_sd.unet import train_unet  # noqa: E402
from tiny_sd.vae import train_vae  # noqa: E402

from lora_compress.evaluation.shapes import WORDS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "assets" / "tiny-sd", help="the model folder to write")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "tiny_sd_work", help="where checkpoints live")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe-steps", type=int, default=1500, help="of 64 pictures")
    parser.add_argument("--vae-steps", type=int, default=2500, help="of 8 pictures")
    parser.add_argument("--unet-steps", type=int, default=5500, help="of 32 pictures; takes most of the time")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.use_deterministic_algorithms(True, warn_only=True)
    args.work.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    tokenizer = write_tokenizer(WORDS, args.output)
    save_probe(train_probe(args.work, args.seed, args.probe_steps), args.output)
    vae = train_vae(args.work, args.seed, args.vae_steps)
    unet, text_encoder = train_unet(args.work, args.seed, args.unet_steps, vae, tokenizer)
    size = save_pipeline(args.output, vae, unet.module, text_encoder.module, tokenizer)
    print(f"{args.output}: {size / 2**20:.1f} MB, {(time.monotonic() - begun) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
