"""What compression changes in the denoiser's output, relative to what the LoRA changes: the same noisy latents for all three."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import EvaluationError
from .attachment import Lora, attached
from .base_model import Pipeline, denoiser_of

__all__ = ["OutputError", "relative_output_error"]

_INPUTS = ("sample", "hidden_states")


@dataclass(frozen=True)
class OutputError:
    """Squared norms by prompt and timestep.

    Args:
        timesteps: (T,), falling.
        lost: (N, T), ||eps_c - eps_o||^2.
        effect: (N, T), ||eps_o - eps_b||^2.
    """

    timesteps: tuple[float, ...]
    lost: Tensor
    effect: Tensor

    @classmethod
    def joined(cls, parts: Sequence[OutputError]) -> OutputError:
        """Of all prompts of several batches."""
        lost, effect = (torch.cat(tensors) for tensors in zip(*((part.lost, part.effect) for part in parts), strict=True))
        return cls(parts[0].timesteps, lost, effect)

    @property
    def value(self) -> float:
        """sqrt(sum lost / sum effect) over all prompts and timesteps."""
        return float((self.lost.sum() / self.effect.sum()).sqrt())

    @property
    def by_timestep(self) -> list[float]:
        """sqrt(sum lost / sum effect) over the prompts, for each timestep."""
        return (self.lost.sum(dim=0) / self.effect.sum(dim=0)).sqrt().tolist()

    @property
    def by_prompt(self) -> Tensor:
        """(N, 2): lost and effect, summed over the timesteps."""
        return torch.stack([self.lost.sum(dim=1), self.effect.sum(dim=1)], dim=1)


@dataclass
class _Tape:
    """Inputs, timesteps and outputs of the denoiser, call by call."""

    samples: list[Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def relative_output_error(
    pipeline: Pipeline, original: Lora, others: Sequence[Lora], draw: Callable[[], Any], prompts: int
) -> list[OutputError]:
    """||eps_c - eps_o|| / ||eps_o - eps_b|| along the path that the original LoRA takes, for each of `others`.

    The pipeline runs once with the original; every latent that goes into the denoiser is kept, and given to it again in place of
    their own when the base model (b) and each compressed LoRA (c) run: what is compared is one step, not where many of them led.
    Text embeddings are those of each model's own text encoder.

    Args:
        pipeline: the base model.
        original: the LoRA before compression (o).
        others: LoRA that are compared with it.
        draw: runs the pipeline once over all prompts, in one batch.
        prompts: in that batch; guidance doubles it, all without the prompt first.

    Raises:
        EvaluationError: the original LoRA changes nothing, so that there is nothing to compare with.
    """
    with attached(pipeline, original):
        reference = _run(pipeline, draw)
    base = _run(pipeline, draw, reference)
    effect = _squares(reference, base, prompts)
    if not float(effect.sum()) > 0.0:
        raise EvaluationError(f"{original.path}: changes nothing in the base model: there is nothing that could be lost")
    found = []
    for lora in others:
        with attached(pipeline, lora):
            found.append(
                OutputError(tuple(reference.timesteps), _squares(_run(pipeline, draw, reference), reference, prompts), effect)
            )
    return found


def _run(pipeline: Pipeline, draw: Callable[[], Any], forced: _Tape | None = None) -> _Tape:
    tape = _Tape()
    with _taped(denoiser_of(pipeline), tape, forced), torch.no_grad():
        draw()
    return tape


@contextmanager
def _taped(model: torch.nn.Module, tape: _Tape, forced: _Tape | None) -> Iterator[None]:
    """Keep what goes in and comes out; with `forced`, its inputs go in instead."""

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = next((name for name in _INPUTS if name in kwargs), None)
        sample = args[0] if args else kwargs[name or _INPUTS[0]]
        if forced is not None:
            sample = forced.samples[len(tape.samples)].to(sample)
            args, kwargs = ((sample, *args[1:]), kwargs) if args else (args, {**kwargs, str(name): sample})
        tape.samples.append(sample.detach().cpu())
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        tape.timesteps.append(float(time.flatten()[0]) if isinstance(time, Tensor) else float(time))
        return args, kwargs

    def after(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tape.outputs.append(output[0].detach().double().cpu())

    handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _squares(first: _Tape, second: _Tape, prompts: int) -> Tensor:
    """||first - second||^2 of the outputs, (prompts, calls)."""
    columns = []
    for one, other in zip(first.outputs, second.outputs, strict=True):
        squares = (one - other).square().flatten(1).sum(dim=1)  # (batch,)
        columns.append(squares.reshape(-1, prompts).sum(dim=0))
    return torch.stack(columns, dim=1)
