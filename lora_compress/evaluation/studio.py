"""Draws the pictures of an evaluation: base model, original LoRA and compressed one from the same prompts and the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attachment import Lora, attached, rounded
from .base_model import Pipeline, draw

__all__ = ["Drawings", "Studio"]

_OTHER_SEEDS = 1_000_003  # added to a seed: noise that no other picture starts from


@dataclass(frozen=True)
class Drawings:
    """Pictures, uint8 (N, 3, H, W); the i-th of each from the same prompt and noise, except other_seed.

    Args:
        base: without a LoRA.
        lora: of the LoRA that is evaluated.
        full: of the original, where there is one.
        floor: of the original, or else of the LoRA, its factors rounded to bfloat16: a change that nobody calls a loss.
        other_seed: of the original, or else of the LoRA, from other noise; only where sets are compared or there is an original.
    """

    base: Tensor
    lora: Tensor
    full: Tensor | None
    floor: Tensor
    other_seed: Tensor | None

    @property
    def count(self) -> int:
        """N."""
        return len(self.lora)

    def shown(self) -> dict[str, Tensor]:
        """Those that are worth looking at."""
        if self.full is None:
            return {"base": self.base, "LoRA": self.lora}
        return {"base": self.base, "full": self.full, "compressed": self.lora}


class Studio:
    """A base model, the prompts, and how they are drawn.

    Args:
        pipeline: of the base model.
        prompts: N.
        seed: of the first picture; those of the others follow it.
        options: of `base_model.draw`.
        progress: called with (what is drawn, pictures drawn, pictures in all).
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        seed: int,
        options: dict[str, Any],
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self._prompts, self._seed, self._options, self._progress = list(prompts), seed, options, progress

    def draw_all(self, lora: Lora, full: Lora | None, *, spare: bool) -> Drawings:
        """All pictures; `spare`: also those from other noise when there is no original."""
        reference = full or lora
        for each in (reference, lora):  # a LoRA that does not fit is refused before minutes of drawing
            with attached(self.pipeline, each):
                pass
        return Drawings(
            base=self._draw("base model", None),
            lora=self._draw("compressed LoRA" if full else "LoRA", lora),
            full=self._draw("full LoRA", full) if full else None,
            floor=self._draw("floor", rounded(reference, torch.bfloat16)),
            other_seed=self._draw("other noise", reference, _OTHER_SEEDS) if full or spare else None,
        )

    def runs(self, count: int) -> Iterator[tuple[Callable[[], Tensor], int]]:
        """Runs of the pipeline over the first `count` prompts without decoding: (run, prompts in its one batch)."""
        for begin in range(0, count, self._options["batch"]):
            prompts = self._prompts[begin : min(begin + self._options["batch"], count)]
            seeds = [self._seed + begin + i for i in range(len(prompts))]
            yield partial(draw, self.pipeline, prompts, seeds=seeds, **self._options, output_type="latent"), len(prompts)

    def _draw(self, title: str, lora: Lora | None, shift: int = 0) -> Tensor:
        def told(done: int, total: int) -> None:
            if self._progress:
                self._progress(title, done, total)

        seeds = [self._seed + shift + i for i in range(len(self._prompts))]
        with attached(self.pipeline, lora):
            return draw(self.pipeline, self._prompts, seeds=seeds, **self._options, progress=told)
