"""One name for a layer, however LoRA files and checkpoints spell it."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["SGM_OUTSIDE", "SGM_RESNET", "LayerRows", "component_and_path", "layer_name", "layers_of_key"]

_LORA_PREFIXES = (
    ("unet", r"lora_unet_|lora_transformer_|lycoris_|unet\.|transformer\.|(?:model\.)?diffusion_model\."),
    ("te1", r"lora_te1?_|text_encoder\."),
    ("te2", r"lora_te2_|text_encoder_2\."),
    ("te3", r"lora_te3_|text_encoder_3\."),
)
_CHECKPOINT_PREFIXES = (
    ("unet", r"(?:model\.)?diffusion_model\.|unet\."),
    (
        "te1",
        r"cond_stage_model\.(?:transformer|model)\.|conditioner\.embedders\.0\.transformer\.|text_encoders\.clip_l\.transformer\.",
    ),
    ("te2", r"conditioner\.embedders\.1\.model\.|text_encoders\.clip_g\.transformer\."),
    ("te3", r"text_encoders\.t5xxl\.transformer\."),
    ("te1", r"(?=text_model\.)"),
)
SGM_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
SGM_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
_OPEN_CLIP = {"attn_out_proj": "self_attn_out_proj", "mlp_c_fc": "mlp_fc1", "mlp_c_proj": "mlp_fc2"}


@dataclass(frozen=True)
class LayerRows:
    """A layer's weight: the `part`-th of `parts` equal blocks of a checkpoint tensor's rows."""

    name: str
    part: int = 0
    parts: int = 1


def layer_name(module: str) -> str:
    """The one name of a LoRA module's layer: component, "/", and the diffusers path with underscores.

    Kohya names with LDM (lora_unet_input_blocks_4_1_...) or diffusers paths, dotted names (unet....attn1.to_q), PEFT's
    base_model.model. in front and diffusers' old attention processors (...processor.to_q_lora) all lead to the same name.
    """
    component, path = component_and_path(module)
    return f"{component or 'unet'}/{path}"


def component_and_path(module: str) -> tuple[str | None, str]:
    """The two parts of `layer_name`; the component is None where a name does not tell it, as in PEFT's files of one model.

    >>> component_and_path("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    ('te1', 'text_model_encoder_layers_0_mlp_fc1')
    >>> component_and_path("base_model.model.mid_block.attentions.0.proj_in")
    (None, 'mid_block_attentions_0_proj_in')
    """
    name = module.removeprefix("base_model.model.")
    old = re.fullmatch(r"(.*)\.processor\.((add_)?(to_[qkv]|to_out))(_lora)?", name)
    if old:
        name = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
    for component, pattern in _LORA_PREFIXES:
        match = re.match(pattern, name)
        if match:
            return component, _diffusers_path(name[match.end() :].replace(".", "_"))
    return None, _diffusers_path(name.replace(".", "_"))


def layers_of_key(key: str, component: str | None = None) -> list[LayerRows]:
    """The layers whose weight a checkpoint's key holds, [] if it is no weight; OpenCLIP's fused in_proj_weight holds three.

    Args:
        key: of a single-file checkpoint (LDM, SGM, SD3, bare DiT), or of a file of one diffusers component.
        component: "unet", "te1", ... where the file's folder says it.
    """
    path = re.sub(r"(?:\.weight|_weight)$", "", key)
    if path == key:
        return []
    for each, pattern in _CHECKPOINT_PREFIXES if component is None else ():
        match = re.match(pattern, path)
        if match:
            component, path = each, path[match.end() :]
            break
    name = path.replace(".", "_")
    block = re.fullmatch(r"transformer_resblocks_(\d+)_(\w+)", name)
    if block is None:
        return [LayerRows(f"{component or 'unet'}/{_diffusers_path(name)}")]
    layer = f"{component}/text_model_encoder_layers_{block[1]}"
    if block[2] == "attn_in_proj":
        return [LayerRows(f"{layer}_self_attn_{letter}_proj", part, 3) for part, letter in enumerate("qkv")]
    return [LayerRows(f"{layer}_{_OPEN_CLIP.get(block[2], block[2])}")]


def _diffusers_path(path: str) -> str:
    """The diffusers spelling of an LDM U-Net path (two resnets a block, as in SD1, SD2 and SDXL); others as they are."""
    if path in SGM_OUTSIDE:
        return SGM_OUTSIDE[path]
    middle = re.fullmatch(r"middle_block_([012])_(\w+)", path)
    if middle:
        return f"mid_block_attentions_0_{middle[2]}" if middle[1] == "1" else _resnet("mid_block", int(middle[1]) // 2, middle[2])
    block = re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(\w+)", path)
    if block is None:
        return path
    down = block[1] == "input"
    number, layer = divmod(int(block[2]) - down, 3)
    where = f"{'down' if down else 'up'}_blocks_{number}"
    if block[4] in ("op", "conv"):
        return f"{where}_{'down' if down else 'up'}samplers_0_conv"
    if block[3] == "0":
        return _resnet(where, layer, block[4])
    return f"{where}_attentions_{layer}_{block[4]}"


def _resnet(where: str, layer: int, rest: str) -> str:
    return f"{where}_resnets_{layer}_{SGM_RESNET.get(rest, rest)}"
