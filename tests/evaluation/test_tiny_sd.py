"""The committed tiny-sd: small, loadable offline, of SD1.x's make, and it draws what captions say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_tiny_sd import draw_prompts, picture_accuracy
from tiny_sd.pictures import draw_pictures, sample_drawings, to_unit
from tiny_sd.tokenizer import CACHE_NAME, learn_merges
from transformers import CLIPTokenizer

from lora_compress.evaluation.probe import load_probe
from lora_compress.evaluation.shapes import WORDS, caption


def test_all_of_it_is_at_most_32_mb(tiny_sd: Path):
    assert sum(path.stat().st_size for path in tiny_sd.rglob("*") if path.is_file()) <= 32 * 10**6


def test_the_cached_tokenizer_is_the_tokenizer(tiny_sd: Path):
    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert files(tiny_sd / "tokenizer") == files(tiny_sd / "tokenizer_cache" / CACHE_NAME)


def test_each_caption_word_is_one_token_and_any_text_tokenizes(tiny_sd: Path):
    tokenizer = CLIPTokenizer.from_pretrained(str(tiny_sd / "tokenizer"))
    assert tokenizer.model_max_length == 77
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert {len(row) for row in ids} == {3}
    assert len({row[1] for row in ids}) == len(WORDS)
    text = "Ünknown wörds, 漢字 & emoji 🎨!"
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.eos_token_id not in ids  # the unknown-word token
    assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_merges_make_every_word_one_token_whatever_their_order():
    words = ["red", "green", "reed", "greenery", "a"]
    assert learn_merges(words) == learn_merges(reversed(words))
    made = {"".join(pair) for pair in learn_merges(words)}
    assert {word + "</w>" for word in words if len(word) > 1} <= made


def test_configs_are_those_sd_scripts_counts_on(tiny_sd: Path):
    unet, vae, scheduler, text = (
        json.loads((tiny_sd / part).read_text())
        for part in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json")
    )
    assert unet["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert (unet["layers_per_block"], unet["attention_head_dim"], unet["norm_num_groups"]) == (2, 8, 32)
    assert all(width % 32 == 0 for width in unet["block_out_channels"])
    assert unet["cross_attention_dim"] == text["hidden_size"]
    assert (vae["scaling_factor"], vae["latent_channels"], len(vae["block_out_channels"])) == (0.18215, 4, 4)
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    assert (scheduler["prediction_type"], scheduler["clip_sample"], scheduler["steps_offset"]) == ("epsilon", False, 1)


@torch.no_grad()
def test_scaled_latents_have_unit_variance_and_pictures_survive_them(pipeline):
    pictures = to_unit(draw_pictures(sample_drawings(64, np.random.default_rng(9), texture=None)))
    latents = pipeline.vae.encode(pictures * 2 - 1).latent_dist.mean  # (64, 4, 8, 8)
    std = (latents * 0.18215).std(dim=(0, 2, 3))
    assert torch.all((std > 0.8) & (std < 1.25)), std
    assert (latents * 0.18215).mean(dim=(0, 2, 3)).abs().max() < 0.25
    decoded = pipeline.vae.decode(latents).sample / 2 + 0.5
    assert (decoded - pictures).abs().mean() < 0.03


@pytest.fixture(scope="module")
def drawn(pipeline):
    """32 pictures drawn from complete captions, with what was asked for."""
    generator = np.random.default_rng(12)
    drawings = sample_drawings(32, generator)
    prompts = [caption(drawing, generator, complete=True) for drawing in drawings]
    return draw_prompts(pipeline, prompts, steps=15, guidance=4.0), drawings, prompts


def test_it_draws_what_captions_say(tiny_sd, drawn):
    pictures, drawings, _ = drawn
    right = picture_accuracy(load_probe(tiny_sd), pictures, drawings)
    for name, share in {"shape": 0.7, "colour": 0.7, "background": 0.7, "texture": 0.7}.items():
        assert right[name] >= share, right  # tools/evaluate_tiny_sd.py asks for 0.85, of many more


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(pipeline, drawn):
    pictures, _, prompts = drawn
    alone = draw_prompts(pipeline, prompts[:2], steps=15, guidance=4.0, batch=1)
    assert torch.allclose(alone, pictures[:2], atol=1e-3)


@torch.no_grad()
def test_sd_scripts_own_unet_takes_the_weights_and_computes_the_same(pipeline, sd_scripts, monkeypatch):
    from library import original_unet

    widths = tuple(pipeline.unet.config.block_out_channels)
    monkeypatch.setattr(original_unet, "BLOCK_OUT_CHANNELS", widths)
    monkeypatch.setattr(original_unet, "TIMESTEP_INPUT_DIM", widths[0])
    monkeypatch.setattr(original_unet, "TIME_EMBED_DIM", widths[0] * 4)
    theirs = original_unet.UNet2DConditionModel(8, 8, pipeline.unet.config.cross_attention_dim, False, False)
    theirs.load_state_dict(pipeline.unet.state_dict())
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, pipeline.unet.config.cross_attention_dim)
    ours = pipeline.unet(latents, 500, context).sample
    assert torch.allclose(theirs.eval()(latents, 500, context).sample, ours, atol=1e-4)
