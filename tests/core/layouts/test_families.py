"""Families by real key names of each model and trainer."""

from __future__ import annotations

import pytest

from lora_compress.names.families import family_of, part_of
from lora_compress.update import ModuleShape

LINEAR = (64, 64)
# family, {name: (outputs, inputs)}: names as sd-scripts, diffusers, ai-toolkit, OneTrainer, SimpleTuner and ComfyUI write them
FILES: dict[str, tuple[str, dict[str, tuple[int, int]]]] = {
    "SD1 kohya": (
        "sd1",
        {
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
        },
    ),
    "SD1 without text attention": ("sd1", {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k": (320, 320)}),
    "SD1 LoCon": (
        "sd1",
        {"lora_unet_down_blocks_3_resnets_0_conv1": (1280, 1280), "lora_unet_up_blocks_3_resnets_0_conv1": (320, 640)},
    ),
    "SD1 diffusers": ("sd1", {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k": (320, 768)}),
    "SD1 text encoder": ("sd1", {"lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768)}),
    "SD1 ControlLoRA": ("sd1", {"input_blocks.1.1.transformer_blocks.0.attn2.to_k": (320, 768)}),
    "SD2 kohya": ("sd2", {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v": (1280, 1024)}),
    "SD2 text encoder": ("sd2", {"lora_te_text_model_encoder_layers_22_mlp_fc1": (4096, 1024)}),
    "SD2 without text attention": (
        "sd2",
        {"lora_te_text_model_encoder_layers_3_mlp_fc1": (4096, 1024), "lora_unet_down_blocks_3_resnets_0_conv1": (1280, 1280)},
    ),
    "SDXL kohya": (
        "sdxl",
        {
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
            "lora_te2_text_model_encoder_layers_0_mlp_fc1": (5120, 1280),
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048),
        },
    ),
    "SDXL without text attention": ("sdxl", {"lora_unet_middle_block_1_transformer_blocks_7_attn1_to_q": (1280, 1280)}),
    "SDXL diffusers": ("sdxl", {"unet.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj": (10240, 1280)}),
    "SDXL ControlLoRA": ("sdxl", {"input_blocks.4.1.transformer_blocks.0.attn2.to_k": (640, 2048)}),
    "SDXL text encoders": (
        "sdxl",
        {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768), "lora_te2_text_model_encoder_layers_0_mlp_fc1": (5120, 1280)},
    ),
    "SD3 kohya": (
        "sd3",
        {
            "lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536),
            "lora_te3_encoder_block_0_layer_0_SelfAttention_k": (4096, 4096),
        },
    ),
    "SD3 diffusers": ("sd3", {"transformer.transformer_blocks.0.attn.add_k_proj": (1536, 1536)}),
    "SD3.5 large OneTrainer": ("sd3", {"lora_transformer_transformer_blocks_0_attn_to_q": (2432, 2432)}),
    "FLUX.1 kohya": (
        "flux1",
        {"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072), "lora_unet_single_blocks_0_linear1": (21504, 3072)},
    ),
    "FLUX.1 ai-toolkit": (
        "flux1",
        {
            "transformer.transformer_blocks.0.attn.to_q": (3072, 3072),
            "transformer.single_transformer_blocks.0.proj_mlp": (12288, 3072),
        },
    ),
    "FLUX.1 OneTrainer": ("flux1", {"lora_transformer_single_transformer_blocks_0_attn_to_q": (3072, 3072)}),
    "FLUX.1 double blocks only": ("flux1", {"transformer.transformer_blocks.18.attn.to_q": (3072, 3072)}),
    "FLUX.1 xlabs": ("flux1", {"double_blocks.0.processor.qkv_lora1": (9216, 3072)}),
    "FLUX.1 BFL": ("flux1", {"single_blocks.0.modulation.lin": (9216, 3072)}),
    "FLUX.2 dev ai-toolkit": ("flux2", {"diffusion_model.double_blocks.0.img_attn.qkv": (18432, 6144)}),
    "FLUX.2 klein 4B": (
        "flux2",
        {"diffusion_model.double_blocks.0.img_attn.qkv": (9216, 3072), "diffusion_model.single_blocks.0.linear1": (27648, 3072)},
    ),
    "FLUX.2 klein 9B LoKr": ("flux2", {"double_blocks.0.img_attn.qkv": (12288, 4096)}),
    "FLUX.2 diffusers": ("flux2", {"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": (27648, 3072)}),
    "Lumina 2 kohya": (
        "lumina",
        {"lora_unet_layers_0_attention_qkv": (3840, 2304), "lora_unet_layers_0_feed_forward_w1": (9216, 2304)},
    ),
    "Z-Image": ("unknown", {"diffusion_model.layers.0.attention.to_q": (3840, 3840)}),
    "HunyuanImage kohya": (
        "hunyuan_image",
        {"lora_unet_double_blocks_0_img_mlp_fc1": (14336, 3584), "lora_unet_single_blocks_0_linear1": (25088, 3584)},
    ),
    "HunyuanImage ComfyUI": ("hunyuan_image", {"lora_unet_double_blocks_0_img_attn_qkv": (10752, 3584)}),
    "HunyuanVideo": (
        "unknown",
        {"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072), "lora_unet_single_blocks_39_linear1": (21504, 3072)},
    ),
    "Anima kohya": (
        "anima",
        {"lora_unet_blocks_0_cross_attn_k_proj": (2048, 1024), "lora_te_layers_0_self_attn_q_proj": (2048, 1024)},
    ),
    "Anima ComfyUI": (
        "anima",
        {
            "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj": (1024, 1024),
            "diffusion_model.blocks.0.mlp.layer1": (8192, 2048),
        },
    ),
    "Wan": ("wan", {"diffusion_model.blocks.0.cross_attn.k": (5120, 5120), "diffusion_model.blocks.0.ffn.0": (13824, 5120)}),
    "Wan musubi": ("wan", {"lora_unet_blocks_0_self_attn_q": (5120, 5120)}),
    "Wan Fun": ("wan", {"lora_unet__blocks_0_cross_attn_k": (5120, 5120)}),
    "Wan diffusers": ("wan", {"transformer.blocks.0.attn1.to_q": (5120, 5120)}),
    "Wan OneTrainer": ("wan", {"lora_transformer_blocks_0_attn1_to_q": (5120, 5120)}),
    "Wan PEFT": ("wan", {"base_model.model.blocks.0.attn2.add_k_proj": (5120, 5120)}),
    "Qwen-Image": (
        "qwen_image",
        {"transformer_blocks.0.attn.add_k_proj": (3072, 3072), "transformer_blocks.0.img_mlp.net.2": (3072, 12288)},
    ),
    "Qwen-Image musubi": ("qwen_image", {"lora_unet_transformer_blocks_0_txt_mlp_net_0_proj": (12288, 3072)}),
    "Qwen-Image attention": ("qwen_image", {f"diffusion_model.transformer_blocks.{i}.attn.to_q": (3072, 3072) for i in range(60)}),
    "SimpleTuner LyCORIS FLUX.1": ("flux1", {"lycoris_single_transformer_blocks_0_attn_to_q": (3072, 3072)}),
    "something else": ("unknown", {"decoder.layers.0.mlp": LINEAR}),
    "CLIP of PEFT": ("sd1", {"base_model.model.text_model.encoder.layers.0.self_attn.q_proj": (768, 768)}),
    "CLIP of diffusers": ("sd2", {"text_model.encoder.layers.0.self_attn.q_proj": (1024, 1024)}),
    "T5": ("t5", {"lora_te2_encoder_block_0_layer_0_SelfAttention_q": (4096, 4096)}),
    "T5 of PEFT": ("t5", {"base_model.model.encoder.block.3.layer.1.DenseReluDense.wo": (4096, 10240)}),
    "Qwen": ("qwen", {"base_model.model.model.layers.0.self_attn.k_proj": (512, 3584)}),
    "Qwen without its head": ("qwen", {"base_model.model.layers.0.self_attn.k_proj": (1024, 2560)}),
    "cloneofsimo": ("sd1", {"unet:0": (320, 320), "unet:1": (320, 768)}),
    "a U-Net named twice": ("sd2", {"lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 1024)}),
    "language model": ("unknown", {"base_model.model.model.layers.0.self_attn.q_proj": (4096, 4096)}),
}


@pytest.mark.parametrize(("family", "names"), FILES.values(), ids=FILES.keys())
def test_the_family_is_known(family: str, names: dict[str, tuple[int, int]]) -> None:
    assert family_of({name: ModuleShape(*size, (), 4) for name, size in names.items()}) == family


@pytest.mark.parametrize(
    ("name", "family", "part"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "sd1", "text encoder"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "sdxl", "text encoder 1"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_k", "sd3", "text encoder 3"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "sdxl", "text encoder 1"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "sd1", "text encoder"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "sdxl", "text encoder 2"),
        ("text_encoders.qwen3_06b.transformer.model.layers.0.mlp.up_proj", "anima", "text encoder"),
        ("lora_unet_mid_block_attentions_0_proj_in", "sd1", "U-Net"),
        ("unet.mid_block.attentions.0.proj_in", "unknown", "U-Net"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "flux1", "DiT"),
        ("transformer.transformer_blocks.0.attn.to_q", "qwen_image", "DiT"),
        ("lora_unet_blocks_0_self_attn_q", "wan", "DiT"),
        ("transformer.txt_in", "unknown", "DiT"),
    ],
)
def test_the_part_of_a_module(name: str, family: str, part: str) -> None:
    assert part_of(name, family) == part


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("base_model.model.text_model.encoder.layers.0.self_attn.q_proj", (768, 768)),
        ("base_model.model.encoder.block.0.layer.0.SelfAttention.q", (4096, 4096)),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", (4096, 4096)),
        ("base_model.model.model.layers.0.self_attn.k_proj", (512, 3584)),
        ("base_model.model.layers.0.self_attn.k_proj", (1024, 2560)),
        ("base_model.model.model.layers.0.mlp.gate_proj", (11008, 4096)),
        ("text_encoder:3", (768, 768)),
    ],
)
def test_a_text_encoder_alone_is_no_dit(name: str, size: tuple[int, int]) -> None:
    family = family_of({name: ModuleShape(*size, (), 4)})
    assert part_of(name, family).startswith("text encoder")


def test_layers_of_a_diffusion_model_are_no_language_model() -> None:
    names = [f"base_model.model.layers.0.{attention}_attn.q_proj" for attention in ("self", "cross")]
    family = family_of({name: ModuleShape(2048, 2048, (), 4) for name in names})
    assert {part_of(name, family) for name in names} == {"DiT"}
