"""Inputs of the layers in the last steps of a training, and the calibration file that is made of them for the final weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..sources.load import load_lora
from ..update import LowRankUpdate
from ..weighting import Moments, save_calibration
from .pairs import Pair, is_convolution

if TYPE_CHECKING:
    from .session import TrainingSession

__all__ = ["calibration_layout", "calibration_path", "observe_inputs", "write_calibration"]

_LEAST_SAMPLES = 64  # input vectors of a module that are remembered, or two for each component
_BATCHES = 32  # that these are taken from, the last ones


def calibration_layout(pairs: Mapping[str, Pair]) -> dict[str, tuple[torch.dtype, dict[str, tuple[int, ...]]]]:
    """Buffers: the last input vectors of each pair in half precision, a mean square for each input channel, batches seen."""
    samples: dict[str, tuple[int, ...]] = {
        name: (max(_LEAST_SAMPLES, 2 * pair.rank), pair.row_sizes[0]) for name, pair in pairs.items()
    }
    channels: dict[str, tuple[int, ...]] = {name: (pair.weights[0].shape[1],) for name, pair in pairs.items()}
    return {
        "samples": (torch.float16, samples),
        "squares": (torch.float32, channels),
        "batches": (torch.int64, dict.fromkeys(pairs, (1,))),
    }


@torch.no_grad()
def observe_inputs(session: TrainingSession, pair: Pair, x: Tensor) -> None:
    """Remember some input vectors of a batch, in turn in place of the oldest, and fold its squares into their mean."""
    state = session.state
    samples, squares = state.part("samples", pair.name), state.part("squares", pair.name)
    batches = state.part("batches", pair.name)
    channels_last = x.movedim(1, -1) if is_convolution(pair.down) else x
    mean = channels_last.reshape(-1, channels_last.shape[-1]).float().square().mean(dim=0)
    batches += 1
    squares.lerp_(mean, 1.0 / batches)
    each, seen = max(len(samples) // _BATCHES, 1), int(batches) - 1
    vectors = _vectors(pair.down, x.detach(), each, seen)
    places = (torch.arange(len(vectors), device=x.device) + seen * each) % len(samples)
    samples[places] = vectors.clamp(-65504.0, 65504.0).to(samples.dtype)


def write_calibration(session: TrainingSession, file: str | os.PathLike[str]) -> Path:
    """Write the calibration of a LoRA file that has just been saved, beside it: second moments of the inputs of its modules.

    The Gram matrix is that of the weights as they stand in the file. Modules that saw no input (those of a text encoder whose
    outputs were cached) are left out.

    Raises:
        SettingsError: nothing has been sampled yet.
        SaveError: the file cannot be written.
    """
    updates: dict[str, LowRankUpdate] = load_lora(file).updates
    first = {pair.module: pair for pair in reversed(session.pairs.values())}  # parts of a split module have the same input
    moments = {name: _moments(session, first[name], update) for name, update in updates.items() if name in first}
    found = {name: moment for name, moment in moments.items() if moment is not None}
    if not found:
        raise SettingsError(["collect_calibration=true: no input was seen in the last steps: train longer"], "training")
    path = calibration_path(file)
    save_calibration(path, updates, found)
    return path


def calibration_path(file: str | os.PathLike[str]) -> Path:
    """`<stem>.calibration.safetensors` beside a LoRA file."""
    return Path(file).with_suffix(".calibration.safetensors")


def _moments(session: TrainingSession, pair: Pair, update: LowRankUpdate) -> Moments | None:
    state = session.state
    batches = int(state.part("batches", pair.name))
    if not batches:
        return None
    samples = state.part("samples", pair.name).cpu()
    count = min(batches * max(len(samples) // _BATCHES, 1), len(samples))
    outputs = samples[:count].double() @ update.down_matrix.double().T  # (n, r)
    return Moments(outputs.T @ outputs / count, state.part("squares", pair.name).cpu())


def _vectors(layer: nn.Module, x: Tensor, count: int, turn: int) -> Tensor:
    """`count` of the input vectors that a batch consists of, (count, in * kernel), others at each turn."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[_places(len(rows), count, turn, x.device)]
    picture = x[turn % len(x)].unsqueeze(0)
    if not isinstance(layer, nn.Conv2d):
        raise SettingsError(
            [f"collect_calibration=true: a {type(layer).__name__} cannot be sampled: nn.Linear or nn.Conv2d can"], "training"
        )
    if isinstance(layer.padding, str):
        raise SettingsError([f"collect_calibration=true: padding={layer.padding} of a convolution cannot be sampled"], "training")
    columns = nn.functional.unfold(picture.float(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T
    return columns[_places(len(columns), count, turn, x.device)]


def _places(total: int, count: int, turn: int, device: torch.device) -> Tensor:
    """Places that spread over all and fall on others at each turn: multiples of the golden ratio."""
    fractions = (torch.arange(count, dtype=torch.float64) + turn * count + 1) * 0.6180339887498949 % 1.0
    return (fractions * total).long().to(device)
