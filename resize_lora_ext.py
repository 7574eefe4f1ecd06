"""Compress finished LoRA files: `python resize_lora_ext.py --model IN --save_to OUT --target_size 20MB`, see --help."""

import runpy
import sys
from pathlib import Path

try:
    from lora_compress.cli import leave, main
except KeyboardInterrupt:  # while torch is imported, which takes seconds
    sys.exit(130)

if __name__ == "__main__":
    if sys.argv[1:2] in (["evaluate"], ["run"]):  # diffusers and sd-scripts import torchvision, which needs a hand beside CPU torch
        repair = (
            Path(__file__).resolve().parent / "library" / "compress_torchvision.py"
        )  # by path: a host's `library` may hide ours
        runpy.run_path(str(repair))["declare_missing_operators"]()
    leave(main())
