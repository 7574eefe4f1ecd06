"""LoRA files, packed or plain, in pipelines of diffusers: every rank and alpha as the file says. Needs diffusers and PEFT."""

from .loading import load_lora

__all__ = ["load_lora"]
