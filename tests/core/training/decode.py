"""Run as a script: decode a LoRA file in a process that knows nothing of the training, and save the factors for torch.load."""

from __future__ import annotations

import sys

import torch

from lora_compress import load_lora

if __name__ == "__main__":
    file = load_lora(sys.argv[1])
    torch.save({name: (update.down, update.up, update.scale) for name, update in file.updates.items()}, sys.argv[2])
