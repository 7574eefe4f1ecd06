"""Stage: the U-Net, and with it the (already taught) text encoder, on pre-encoded plain drawings with SD1.x's noise schedule."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTokenizer

from lora_compress.evaluation.shapes import Drawing, caption

from .loop import adamw, numpy_generator, run_steps, torch_generator
from .pictures import draw_pictures, sample_drawings, to_unit
from .text import WIDTH, build_text_encoder, teach_text_encoder
from .vae import SCALING_FACTOR

__all__ = ["Average", "train_unet"]

logger = logging.getLogger(__name__)

_STREAM = 3  # of the seed
_DRAWINGS = 16000
_CAPTIONS = 4  # per drawing
_LENGTH = 77
_SHORT = 32  # captions, unknown words included, mostly end before this; the first half of the training attends no further
_TEXT_STEPS = 600
_LEARNING_RATE = 6e-4
_DROPPED_CAPTIONS = 0.1  # for classifier-free guidance
_UNKNOWN_WORDS = 0.15  # share of captions with some letters of nonsense, so that unknown words are ignored
# The squared error of the noise times 1 + 1 / SNR is that of v (Salimans and Ho, https://arxiv.org/abs/2202.00512). Plain, almost
# nothing depends on the noisiest steps; in a picture of 64 latent pixels those alone need the caption to know the colours.
_MAX_WEIGHT = 20.0


@dataclass(frozen=True)
class _Data:
    """Everything a training step draws from; means and stds are of scaled latents."""

    means: torch.Tensor  # (N, 4, 8, 8)
    stds: torch.Tensor  # (N, 4, 8, 8)
    tokens: torch.Tensor  # (N, captions, 77) int64
    empty: torch.Tensor  # (77,) int64


class Average:
    """An exponential moving average of a module's weights, as a second module."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.999) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        """Move a little towards the module; early on, when the average is young, further."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)

    def state_dict(self) -> Mapping[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state_dict)


def build_unet() -> UNet2DConditionModel:
    """SD1.x's topology, 64 to 128 wide: 11.2 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 128, 128),
        layers_per_block=2,
        norm_num_groups=32,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        use_linear_projection=False,
    )


def train_unet(
    work: Path, seed: int, steps: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer, batch: int = 32
) -> tuple[Average, Average]:
    """Returns the averaged U-Net and the averaged text encoder."""
    torch.manual_seed(seed)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    data = _prepare_data(work, seed, vae, tokenizer)
    teach_text_encoder(work, seed, _TEXT_STEPS, text_encoder, data.tokens, _sample_drawings(numpy_generator(seed, _STREAM)))
    averages = Average(unet), Average(text_encoder)
    optimizer = adamw(unet, text_encoder, lr=_LEARNING_RATE)
    snr = _signal_to_noise()
    parameters = [*unet.parameters(), *text_encoder.parameters()]

    def take_step(step: int) -> float:
        latents, tokens, noise, t = _draw_batch(data, batch, torch_generator(seed, _STREAM, step))
        if step < steps // 2:
            tokens = tokens[:, :_SHORT]
        ratio = snr[t]  # (N,)
        signal = (ratio / (1 + ratio)).sqrt().view(-1, 1, 1, 1)
        noisy = signal * latents + (1 - signal**2).sqrt() * noise
        predicted = unet(noisy, t, text_encoder(tokens).last_hidden_state).sample
        weight = (1 + 1 / ratio).clamp(max=_MAX_WEIGHT)  # (N,)
        loss = (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        averages[0].update(unet, step)
        averages[1].update(text_encoder, step)
        return float(loss.detach())

    state = {"unet": unet, "text_encoder": text_encoder, "unet_average": averages[0], "text_encoder_average": averages[1]}
    run_steps("unet", steps, take_step, state, optimizer, work)
    _level_unseen_words(averages[1].module, data, seed)
    return averages


def _signal_to_noise() -> torch.Tensor:
    """SD1.x's schedule (scaled_linear, 0.00085 to 0.012): (1000,) ratios of signal variance to noise variance."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, dim=0)
    return (kept / (1 - kept)).float()


def _draw_batch(data: _Data, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """latents (N, 4, 8, 8), tokens (N, 77), noise (N, 4, 8, 8), timesteps (N,)."""
    chosen = torch.randint(len(data.means), (batch,), generator=generator)
    worded = torch.randint(data.tokens.shape[1], (batch,), generator=generator)
    shape = data.means[chosen].shape
    latents = data.means[chosen] + data.stds[chosen] * torch.randn(shape, generator=generator)
    dropped = torch.rand((batch, 1), generator=generator) < _DROPPED_CAPTIONS
    tokens = torch.where(dropped, data.empty, data.tokens[chosen, worded])
    return latents, tokens, torch.randn(shape, generator=generator), torch.randint(1000, (batch,), generator=generator)


def _prepare_data(work: Path, seed: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> _Data:
    """Draw, encode and caption; kept in the work folder."""
    path = work / "latents.pt"
    if path.exists():
        return _Data(**torch.load(path, weights_only=True))
    generator = numpy_generator(seed, _STREAM)
    drawings = _sample_drawings(generator)
    texts = [_word(drawing, generator) for drawing in drawings for _ in range(_CAPTIONS)]
    tokens = tokenizer([*texts, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    logger.info("unet: captions such as %s", "; ".join(texts[:12]))
    means, stds = [], []
    with torch.no_grad():
        for start in range(0, _DRAWINGS, 250):
            pictures = to_unit(draw_pictures(drawings[start : start + 250]))
            posterior = vae.encode(pictures * 2 - 1).latent_dist
            means.append(posterior.mean * SCALING_FACTOR)
            stds.append(posterior.std * SCALING_FACTOR)
    fields = {
        "means": torch.cat(means),
        "stds": torch.cat(stds),
        "tokens": tokens[:-1].view(_DRAWINGS, _CAPTIONS, _LENGTH),
        "empty": tokens[-1],
    }
    torch.save(fields, path)
    return _Data(**fields)


def _sample_drawings(generator: np.random.Generator) -> list[Drawing]:
    return sample_drawings(_DRAWINGS, generator)


def _word(drawing: Drawing, generator: np.random.Generator) -> str:
    """A caption, now and then with words of nonsense in it."""
    words = caption(drawing, generator).split(" ")
    if generator.random() < _UNKNOWN_WORDS:
        for _ in range(int(generator.integers(1, 3))):
            letters = generator.integers(ord("a"), ord("z") + 1, size=int(generator.integers(1, 6)))
            words.insert(int(generator.integers(len(words) + 1)), "".join(map(chr, letters)))
    return " ".join(words)


@torch.no_grad()
def _level_unseen_words(text_encoder: torch.nn.Module, data: _Data, seed: int) -> None:
    """Give words that never occurred (the textures) random embeddings as long as the others: a LoRA can then tell them apart."""
    embedding = text_encoder.text_model.embeddings.token_embedding.weight  # (vocabulary, width)
    seen = torch.zeros(len(embedding), dtype=torch.bool)
    seen[data.tokens.unique()] = True
    fresh = torch.randn(embedding.shape, generator=torch_generator(seed, _STREAM, 0, 1))
    length = embedding[seen].norm(dim=1).median()
    embedding[~seen] = (fresh / fresh.norm(dim=1, keepdim=True) * length)[~seen]
    logger.info("unet: %d of %d tokens occurred; median length of their embeddings %.3f", int(seen.sum()), len(seen), float(length))
