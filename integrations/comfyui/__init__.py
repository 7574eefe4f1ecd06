"""LoRA Compress in ComfyUI: every node that loads LoRA opens packed files, and three nodes of our own."""

from . import adapter, nodes

adapter.register()

NODE_CLASS_MAPPINGS = nodes.NODE_CLASS_MAPPINGS
NODE_DISPLAY_NAME_MAPPINGS = nodes.NODE_DISPLAY_NAME_MAPPINGS
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
