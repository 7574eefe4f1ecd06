"""Writes a LoRA data set of a concept that tiny-sd has never seen, as kohya's trainers read it: pictures with captions beside them.

python tools/make_tiny_dataset.py --output outputs/striped_star --count 32 --repeats 10
... train_network.py --train_data_dir outputs/striped_star --caption_extension .txt --resolution 64
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora_compress.evaluation.shapes import SHAPES, TEXTURES, write_dataset  # noqa: E402

__all__ = ["write_dataset"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder for --train_data_dir")
    parser.add_argument("--count", type=int, default=32, help="pictures")
    parser.add_argument("--concept", nargs=2, default=("striped", "star"), metavar=("TEXTURE", "SHAPE"), help="what they all show")
    parser.add_argument("--repeats", type=int, default=10, help="how often an epoch shows each; in the folder's name")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texture, shape = args.concept
    if texture not in TEXTURES or shape not in SHAPES:
        parser.error(f"--concept takes a texture ({', '.join(TEXTURES)}) and a shape ({', '.join(SHAPES)})")
    inner = write_dataset(args.output, texture, shape, args.count, args.repeats, args.seed)
    print(f"{args.count} pictures with captions in {inner}")


if __name__ == "__main__":
    main()
