"""LoRA files of real models' shapes, with random weights of a falling spectrum: what the benchmarks compress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["MODELS", "write_lora"]

Shape = tuple[str, int, int, tuple[int, ...]]  # module, in, out, kernel


def _clip(prefix: str, layers: int, width: int) -> Iterator[Shape]:
    for layer in range(layers):
        name = f"{prefix}_text_model_encoder_layers_{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{name}_self_attn_{part}", width, width, ()
        yield f"{name}_mlp_fc1", width, 4 * width, ()
        yield f"{name}_mlp_fc2", 4 * width, width, ()


def _transformer(name: str, width: int, context: int, depth: int, projection: tuple[int, ...]) -> Iterator[Shape]:
    yield f"{name}_proj_in", width, width, projection
    for block in range(depth):
        inner = f"{name}_transformer_blocks_{block}"
        for attention, keys in (("attn1", width), ("attn2", context)):
            for part, inputs in (("to_q", width), ("to_k", keys), ("to_v", keys), ("to_out_0", width)):
                yield f"{inner}_{attention}_{part}", inputs, width, ()
        yield f"{inner}_ff_net_0_proj", width, 8 * width, ()
        yield f"{inner}_ff_net_2", 4 * width, width, ()
    yield f"{name}_proj_out", width, width, projection


def _unet(widths: tuple[int, ...], depths: tuple[int, ...], context: int, projection: tuple[int, ...]) -> Iterator[Shape]:
    """The transformers of a U-Net of SD: two in each block on the way down, one in the middle, three on the way up."""
    levels = list(zip(widths, depths, strict=True))
    for i, (width, depth) in enumerate(levels):
        for j in range(2 if depth else 0):
            yield from _transformer(f"lora_unet_down_blocks_{i}_attentions_{j}", width, context, depth, projection)
    yield from _transformer("lora_unet_mid_block_attentions_0", widths[-1], context, max(depths[-1], 1), projection)
    for i, (width, depth) in enumerate(reversed(levels)):
        for j in range(3 if depth else 0):
            yield from _transformer(f"lora_unet_up_blocks_{i}_attentions_{j}", width, context, depth, projection)


def _sdxl_resnets() -> Iterator[Shape]:
    """Time projections and 1x1 shortcuts of SDXL's seventeen resnets."""
    down = [(0, (320, 320), (320, 320)), (1, (320, 640), (640, 640)), (2, (640, 1280), (1280, 1280))]
    middle = [("lora_unet_mid_block_resnets", (1280, 1280), (1280, 1280))]
    up = [
        (0, (2560, 1280), (2560, 1280), (1920, 1280)),
        (1, (1920, 640), (1280, 640), (960, 640)),
        (2, (960, 320), (640, 320), (640, 320)),
    ]
    blocks = [(f"lora_unet_down_blocks_{i}_resnets", *sizes) for i, *sizes in down] + middle
    blocks += [(f"lora_unet_up_blocks_{i}_resnets", *sizes) for i, *sizes in up]
    for name, *sizes in blocks:
        for j, (inputs, outputs) in enumerate(sizes):
            yield f"{name}_{j}_time_emb_proj", 1280, outputs, ()
            if inputs != outputs:
                yield f"{name}_{j}_conv_shortcut", inputs, outputs, (1, 1)


def sdxl() -> Iterator[Shape]:
    """SDXL, U-Net and both text encoders: 1,014 modules, 464 MB at rank 64 in float16."""
    yield from _clip("lora_te1", 12, 768)
    yield from _clip("lora_te2", 32, 1280)
    yield from _unet((320, 640, 1280), (0, 2, 10), 2048, ())
    yield from _sdxl_resnets()


def sd15() -> Iterator[Shape]:
    """SD1.5, U-Net and text encoder: 264 modules."""
    yield from _clip("lora_te", 12, 768)
    yield from _unet((320, 640, 1280, 1280), (1, 1, 1, 0), 768, (1, 1))


def flux() -> Iterator[Shape]:
    """FLUX.1's transformer with fused projections, as sd-scripts trains it: 304 modules."""
    width = 3072
    for i in range(19):
        for stream in ("img", "txt"):
            name = f"lora_unet_double_blocks_{i}_{stream}"
            yield f"{name}_attn_qkv", width, 3 * width, ()
            yield f"{name}_attn_proj", width, width, ()
            yield f"{name}_mlp_0", width, 4 * width, ()
            yield f"{name}_mlp_2", 4 * width, width, ()
            yield f"{name}_mod_lin", width, 6 * width, ()
    for i in range(38):
        name = f"lora_unet_single_blocks_{i}"
        yield f"{name}_linear1", width, 7 * width, ()
        yield f"{name}_linear2", 5 * width, width, ()
        yield f"{name}_modulation_lin", width, 3 * width, ()


MODELS: dict[str, Callable[[], Iterator[Shape]]] = {"sdxl": sdxl, "sd15": sd15, "flux": flux}


def write_lora(path: Path, model: str, rank: int, every: int = 1, dtype: torch.dtype = torch.float16) -> int:
    """Write a kohya LoRA of every `every`-th module of a model, spectra falling as exp(-i / 8); returns its modules."""
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    falling = torch.exp(-torch.arange(rank) / 8).sqrt()
    modules = list(MODELS[model]())[::every]
    for name, inputs, outputs, kernel in modules:
        down = torch.randn(rank, inputs, *kernel, generator=generator) * falling.view(-1, *([1] * (1 + len(kernel))))
        up = torch.randn(outputs, rank, *([1] * len(kernel)), generator=generator)
        up *= falling.view(1, -1, *([1] * len(kernel)))
        tensors[f"{name}.lora_down.weight"] = (down * inputs**-0.5).to(dtype)
        tensors[f"{name}.lora_up.weight"] = (up * outputs**-0.5).to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(rank), dtype=dtype)
    save_file(tensors, path, {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)), "ss_base_model_version": model})
    return len(modules)
