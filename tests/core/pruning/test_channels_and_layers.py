"""Channel and layer pruning against the dense update."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_compress import LowRankUpdate
from lora_compress.pruning import consumer_minimum, drop_layers, select_channels


def uneven_update(seed: int, inputs: int, outputs: int, rank: int, kernel: tuple[int, ...]) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, *kernel, generator=generator)
    down *= torch.rand(inputs, generator=generator).pow(4).view(1, -1, *([1] * len(kernel)))
    up = torch.randn(outputs, rank, generator=generator) * torch.rand(outputs, 1, generator=generator).pow(4)
    return LowRankUpdate(down, up.reshape(outputs, rank, *([1] * len(kernel))), 3.0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([(), (1, 1), (3, 3), (3,), (3, 1, 1)]),
    st.sampled_from([0.0, 0.05, 0.3, 0.999]),
)
def test_channels_are_those_of_the_dense_update(
    seed: int, inputs: int, outputs: int, rank: int, kernel: tuple[int, ...], threshold: float
) -> None:
    update = uneven_update(seed, inputs, outputs, rank, kernel)
    dense = update.dense().view(outputs, inputs, -1)
    kept = select_channels(update, threshold)
    for indices, norms in ((kept.outputs, dense.norm(dim=(1, 2))), (kept.inputs, dense.norm(dim=(0, 2)))):
        least = threshold * float(norms.square().mean().sqrt())
        assert indices.tolist() == [i for i, norm in enumerate(norms.tolist()) if norm >= least * (1 - 1e-12)]
        assert len(indices) >= 1
    pruned = torch.zeros_like(dense)
    pruned[kept.outputs[:, None], kept.inputs[None, :]] = dense[kept.outputs[:, None], kept.inputs[None, :]]
    norm = float(dense.square().sum())
    assert kept.squared_norm == pytest.approx(norm, rel=1e-9)
    assert kept.squared_error == pytest.approx(float((dense - pruned).square().sum()), rel=1e-9, abs=1e-20 * norm)


def test_threshold_0_and_a_zero_update_keep_every_channel() -> None:
    update = uneven_update(0, 5, 7, 2, (3, 3))
    for each, threshold in ((update, 0.0), (LowRankUpdate(update.down * 0, update.up, 1.0), 0.5)):
        kept = select_channels(each, threshold)
        assert (len(kept.inputs), len(kept.outputs), kept.squared_error) == (5, 7, 0.0)


def test_layers_below_their_share_go_unless_protected() -> None:
    norms = {"a": 90.0, "b": 9.0, "c": 1.0, "d": 0.0}
    assert drop_layers(norms, 0.0) == set()
    assert drop_layers(norms, 0.01) == {"d"}
    assert drop_layers(norms, 0.0101) == {"c", "d"}
    assert drop_layers(norms, 0.99) == {"a", "b", "c", "d"}
    assert drop_layers(norms, 0.99, protected={"c"}) == {"a", "b", "d"}


@pytest.mark.parametrize(
    "names",
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", "lora_unet_mid_block_attn2_to_v"),
        ("unet.down_blocks.0.attn2.to_k", "unet.mid_block.attn2.to_v"),
        ("unet.down_blocks.0.attn2.processor.to_k_lora", "unet.mid_block.attn2.processor.to_v_lora"),
    ],
)
def test_the_strongest_cross_attention_projection_is_what_programs_need(names: tuple[str, str]) -> None:
    others = {"lora_unet_a_attn1_to_k": 99.0, "lora_unet_a_attn2_to_q": 99.0, "lora_te_a_self_attn_q_proj": 99.0}
    assert consumer_minimum({names[0]: 1.0, names[1]: 2.0, **others}) == {names[1]}
    assert consumer_minimum({names[0]: 3.0, names[1]: 2.0, **others}) == {names[0]}


def test_files_without_cross_attention_are_known_by_something_else() -> None:
    text = {"lora_te_text_model_encoder_layers_0_self_attn_q_proj": 1.0, "lora_te_text_model_encoder_layers_0_mlp_fc1": 5.0}
    assert consumer_minimum(text) == {"lora_te_text_model_encoder_layers_0_self_attn_q_proj"}
    resnet = {"lora_unet_down_blocks_0_resnets_0_time_emb_proj": 0.5}
    assert consumer_minimum({**text, **resnet}) == set(resnet)
    assert consumer_minimum({"lora_unet_double_blocks_0_img_attn_qkv": 1.0}) == set()
