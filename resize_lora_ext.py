"""Compress finished LoRA files: `python resize_lora_ext.py --model IN --save_to OUT --target_size 20MB`, see --help."""

import sys

from lora_compress.cli import main

if __name__ == "__main__":
    sys.exit(main())
