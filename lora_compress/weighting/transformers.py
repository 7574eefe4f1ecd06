"""What the layers of the original FLUX and SD3 transformers are called in diffusers, which has fused layers apart."""

from __future__ import annotations

__all__ = ["TRANSFORMER_BLOCKS"]

_FLUX_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_SD3_JOINT = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "context_block_attn_proj": ("attn.to_add_out",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
}
TRANSFORMER_BLOCKS = {  # of the original transformers: (blocks of diffusers, what becomes of a layer)
    "double_blocks": ("transformer_blocks", _FLUX_DOUBLE),
    "single_blocks": ("single_transformer_blocks", _FLUX_SINGLE),
    "joint_blocks": ("transformer_blocks", _SD3_JOINT),
}
