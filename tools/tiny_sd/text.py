"""Stage: the text encoder learns to say what a caption says, before the U-Net listens to it; CLIP's, too, comes taught."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_compress.evaluation.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Drawing

from .loop import adamw, run_steps, torch_generator

__all__ = ["WIDTH", "build_text_encoder", "teach_text_encoder"]

WIDTH = 96  # of the text encoder, the U-Net's cross_attention_dim
_STREAM = 4  # of the seed
_ATTRIBUTES: dict[str, Sequence[str]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
}


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model of three layers: 0.4 M parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def teach_text_encoder(
    work: Path,
    seed: int,
    steps: int,
    text_encoder: CLIPTextModel,
    tokens: torch.Tensor,
    drawings: Sequence[Drawing],
    batch: int = 64,
) -> None:
    """Train it, with linear heads that are thrown away, to tell the drawing's attributes at every token from the end mark on.

    tokens: (N, captions, 77) of the N drawings. Attributes that a caption leaves out cannot be told; their loss is the price.
    """
    labels = {
        name: torch.tensor([values.index(getattr(drawing, name)) for drawing in drawings]) for name, values in _ATTRIBUTES.items()
    }
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(WIDTH, len(values)) for name, values in _ATTRIBUTES.items()})
    optimizer = adamw(text_encoder, heads, lr=1e-3)
    end = text_encoder.config.eos_token_id

    def take_step(step: int) -> float:
        generator = torch_generator(seed, _STREAM, step)
        chosen = torch.randint(len(tokens), (batch,), generator=generator)
        worded = torch.randint(tokens.shape[1], (batch,), generator=generator)
        ids = tokens[chosen, worded]  # (N, 77)
        row, column = (ids == end).nonzero(as_tuple=True)
        states = text_encoder(ids).last_hidden_state[row, column]  # (end marks, width)
        losses = [F.cross_entropy(head(states), labels[name][chosen][row]) for name, head in heads.items()]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    run_steps("text", steps, take_step, {"text_encoder": text_encoder, "heads": heads}, optimizer, work)
