"""Narrow instances of the DiT classes of sd-scripts, two blocks deep, with text encoders and a forward through all of them."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "Architecture", "make"]

WORDS, TEXT = 100, 32  # vocabulary and width of the text encoders


@dataclass
class Architecture:
    """A model and its text encoders, as a trainer of sd-scripts passes them to a network module.

    Args:
        model: of the host's class.
        text_encoders: in the host's order.
        network: the host's network module for it.
        run: the model's prediction for fixed inputs, gradients and all.
    """

    model: nn.Module
    text_encoders: list[nn.Module]
    network: str
    run: Callable[[nn.Module, list[nn.Module]], Tensor]

    def predict(self) -> Tensor:
        """The prediction as it is now."""
        return self.run(self.model, self.text_encoders)

    def fresh(self) -> Architecture:
        """A copy, to be taken before a network is applied."""
        return Architecture(copy.deepcopy(self.model), copy.deepcopy(self.text_encoders), self.network, self.run)


def make(kind: str) -> Architecture:
    """The architecture of a model type, weights drawn from a fixed seed."""
    torch.manual_seed(0)
    found = KINDS[kind]()
    for module in (found.model, *found.text_encoders):
        module.requires_grad_(False).eval()
        for name, tensor in module.named_parameters():
            if tensor.ndim > 1:
                nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5)
            else:
                nn.init.constant_(tensor, 0.0 if name.endswith("bias") else 1.0)
    return found


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _ids(length: int = 8) -> Tensor:
    return torch.randint(3, WORDS - 2, (1, length), generator=torch.Generator().manual_seed(2))


def _clip(projection: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=WORDS, projection_dim=TEXT, bos_token_id=98, eos_token_id=99, pad_token_id=99, **sizes)
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": TEXT, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=WORDS, feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes))


def _decoder(name: str) -> nn.Module:
    transformers = importlib.import_module("transformers")
    sizes = {"hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(vocab_size=WORDS, num_key_value_heads=1, head_dim=16, **sizes)
    return getattr(transformers, f"{name}Model")(config)


def _flux() -> Architecture:
    models = importlib.import_module("library.flux_models")
    sizes = {"in_channels": 16, "vec_in_dim": TEXT, "context_in_dim": TEXT, "hidden_size": 64, "num_heads": 2}
    params = models.FluxParams(
        **sizes,
        mlp_ratio=4.0,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[4, 14, 14],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
    )

    def run(model: nn.Module, text_encoders: list[nn.Module]) -> Tensor:
        text = text_encoders[1](_ids())[0]
        return model(
            img=_noise(1, 16, 16),
            img_ids=torch.zeros(1, 16, 3),
            txt=text,
            txt_ids=torch.zeros(1, 8, 3),
            y=text_encoders[0](_ids())["pooler_output"],
            timesteps=torch.tensor([0.5]),
            guidance=torch.tensor([1.0]),
        )

    return Architecture(models.Flux(params), [_clip(), _t5()], "networks.lora_flux", run)


def _chroma() -> Architecture:
    models = importlib.import_module("library.chroma_models")
    sizes = {"in_channels": 16, "context_in_dim": TEXT, "hidden_size": 64, "num_heads": 2, "depth": 2, "depth_single_blocks": 2}
    approximator = {"approximator_in_dim": 64, "approximator_depth": 1, "approximator_hidden_size": 32}
    params = models.ChromaParams(
        **sizes,
        **approximator,
        mlp_ratio=4.0,
        axes_dim=[4, 14, 14],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
        _use_compiled=False,
    )

    def run(model: nn.Module, text_encoders: list[nn.Module]) -> Tensor:
        guidance, times = torch.tensor([0.0]), torch.tensor([0.5])
        return model(
            img=_noise(1, 16, 16),
            img_ids=torch.zeros(1, 16, 3),
            txt=text_encoders[1](_ids())[0],
            txt_ids=torch.zeros(1, 8, 3),
            y=torch.zeros(1, 1),
            timesteps=times,
            guidance=guidance,
            txt_attention_mask=torch.ones(1, 8),
            mod_vectors=model.get_mod_vectors(times, guidance, 1),
        )

    dummy = importlib.import_module("library.flux_utils").dummy_clip_l()
    return Architecture(models.Chroma(params), [dummy, _t5()], "networks.lora_flux", run)


def _sd3() -> Architecture:
    models = importlib.import_module("library.sd3_models")
    params = models.SD3Params(
        patch_size=2,
        depth=2,
        num_patches=64,
        pos_embed_max_size=8,
        adm_in_channels=2 * TEXT,
        qk_norm="rms",
        x_block_self_attn_layers=[0],
        context_embedder_in_features=TEXT,
        context_embedder_out_features=128,
        model_type="5-medium",
    )
    model = models.create_sd3_mmdit(params)
    model.pos_embed.copy_(_noise(1, 64, 128))

    def run(model: nn.Module, text_encoders: list[nn.Module]) -> Tensor:
        pooled = torch.cat([encoder(_ids())["text_embeds"] for encoder in text_encoders[:2]], dim=1)
        return model(_noise(1, 16, 8, 8), torch.tensor([500.0]), pooled, text_encoders[2](_ids())[0])

    return Architecture(model, [_clip(True), _clip(True), _t5()], "networks.lora_sd3", run)


def _lumina() -> Architecture:
    models = importlib.import_module("library.lumina_models")
    sizes = {
        "dim": 96,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT,
    }
    model = models.NextDiT(in_channels=4, qk_norm=True, multiple_of=32, axes_dims=[8, 8, 8], axes_lens=[30, 16, 16], **sizes)

    def run(model: nn.Module, text_encoders: list[nn.Module]) -> Tensor:
        text = text_encoders[0](_ids()).last_hidden_state
        return model(_noise(1, 4, 8, 8), torch.tensor([0.5]), text, torch.ones(1, 8, dtype=torch.int32))

    return Architecture(model, [_decoder("Gemma2")], "networks.lora_lumina", run)


def _hunyuan_image() -> Architecture:
    """Its class has every size as a constant: it is built without memory, and its parts anew by the same classes."""
    models = importlib.import_module("library.hunyuan_image_models")
    modules = importlib.import_module("library.hunyuan_image_modules")
    with torch.device("meta"):
        model = models.HYImageDiffusionTransformer()
    sizes = {"mlp_width_ratio": 4, "mlp_act_type": "gelu_tanh", "qk_norm": True, "qk_norm_type": "rms"}
    model.hidden_size, model.heads_num, model.rope_dim_list = 64, 2, [16, 16]
    model.byt5_in = modules.ByT5Mapper(in_dim=TEXT, out_dim=64, hidden_dim=64, out_dim1=64, use_residual=False)
    model.img_in = modules.PatchEmbed2D(model.patch_size, model.in_channels, 64)
    model.txt_in = modules.SingleTokenRefiner(TEXT, 64, 2, depth=1)
    model.time_in = modules.TimestepEmbedder(64, nn.SiLU)
    model.double_blocks = nn.ModuleList(modules.MMDoubleStreamBlock(64, 2, qkv_bias=True, **sizes) for _ in range(2))
    model.single_blocks = nn.ModuleList(modules.MMSingleStreamBlock(64, 2, **sizes) for _ in range(2))
    model.final_layer = modules.FinalLayer(64, model.patch_size, model.out_channels, nn.SiLU)

    def run(model: nn.Module, text_encoders: list[nn.Module]) -> Tensor:
        mask = torch.ones(1, 8, dtype=torch.int64)
        return model(_noise(1, 64, 4, 4), torch.tensor([500.0]), _noise(1, 8, TEXT), mask, _noise(1, 8, TEXT) + 1, mask)

    return Architecture(model, [nn.Identity(), nn.Identity()], "networks.lora_hunyuan_image", run)


def _anima() -> Architecture:
    models = importlib.import_module("library.anima_models")
    model = models.Anima(
        max_img_h=16,
        max_img_w=16,
        max_frames=4,
        in_channels=16,
        out_channels=16,
        patch_spatial=2,
        patch_temporal=1,
        model_channels=64,
        num_blocks=2,
        num_heads=2,
        crossattn_emb_channels=TEXT,
        pos_emb_cls="rope3d",
        use_adaln_lora=True,
        adaln_lora_dim=8,
        rope_enable_fps_modulation=False,
    )
    model.use_llm_adapter = True  # whose size the class has as a constant
    model.llm_adapter = models.LLMAdapter(TEXT, TEXT, TEXT, num_layers=1, num_heads=2, self_attn=True)

    def run(model: nn.Module, text_encoders: list[nn.Module]) -> Tensor:
        mask = torch.ones(1, 8, dtype=torch.int64)
        text = text_encoders[0](_ids()).last_hidden_state
        masks = {"target_attention_mask": mask, "source_attention_mask": mask}
        return model(
            _noise(1, 16, 1, 8, 8),
            torch.tensor([0.5]),
            text,
            padding_mask=torch.zeros(1, 1, 8, 8),
            target_input_ids=_ids(),
            **masks,
        )

    return Architecture(model, [_decoder("Qwen3")], "networks.lora_anima", run)


KINDS: dict[str, Callable[[], Architecture]] = {
    "flux": _flux,
    "chroma": _chroma,
    "sd3": _sd3,
    "lumina": _lumina,
    "hunyuan_image": _hunyuan_image,
    "anima": _anima,
}
