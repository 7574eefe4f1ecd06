"""Puts a LoRA onto a pipeline for a while, exactly as its file says: any layout, any ranks and alphas, packed or plain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EvaluationError
from ..inspection.comparison import match_names
from ..layouts import as_kohya
from ..sources.load import load_lora
from ..sources.open import open_lora
from ..update import LowRankUpdate
from .base_model import Pipeline, denoiser_of, family_of_pipeline, text_encoders_of

__all__ = ["Lora", "attached", "read_lora", "rounded"]

_NOT_DRAWN = (".dora_scale", "lora_magnitude_vector")


@dataclass(frozen=True)
class Lora:
    """A LoRA to draw with.

    Args:
        path: of its file.
        updates: by module name.
        family: of the model that it is for.
        metadata: of the file.
    """

    path: str
    updates: dict[str, LowRankUpdate]
    family: str
    metadata: dict[str, str]


def read_lora(path: str) -> Lora:
    """The updates of a file of any layout, packed or plain, in float32.

    Raises:
        FormatError: the file cannot be read.
        EvaluationError: it has parts that are not drawn with here (DoRA).
    """
    with open_lora(path) as source:
        family = source.family
    file = load_lora(path, torch.float32)
    strange = next((key for key in file.others if any(part in key for part in _NOT_DRAWN)), None)
    if strange is not None:
        raise EvaluationError(f"{path}: {strange}: DoRA is not evaluated here: merge it, or compare the files by their weights")
    return Lora(path, file.updates, family, file.metadata)


def rounded(lora: Lora, dtype: torch.dtype) -> Lora:
    """The same with factors rounded to a type, such as bfloat16: what every training program does to a LoRA unasked."""
    updates = {
        name: LowRankUpdate(update.down.to(dtype).float(), update.up.to(dtype).float(), update.alpha)
        for name, update in lora.updates.items()
    }
    return Lora(lora.path, updates, lora.family, lora.metadata)


@contextmanager
def attached(pipeline: Pipeline, lora: Lora | None) -> Iterator[None]:
    """The pipeline with the LoRA inside; None leaves it as it is.

    Where every module is a layer of the pipeline, x -> up (down x) alpha / r is added to its output: exact, and gone afterwards.
    Names of other programs (sgm's SDXL, FLUX.1 of kohya) go through diffusers' own converter, all ranks padded to one and all
    scales in the factors, because some of its versions take the first rank and alpha for all.

    Raises:
        EvaluationError: the LoRA is for another family, or does not fit.
    """
    if lora is None:
        yield
        return
    layers = _layers(pipeline)
    pairs = match_names(lora.updates, layers)
    unknown = [name for name in lora.updates if name not in pairs]
    families = lora.family, family_of_pipeline(pipeline)
    if "unknown" not in families and families[0] != families[1]:
        name = unknown[0] if unknown else next((n for n in pairs if not _fits(lora.updates[n], layers[pairs[n]])), None)
        if name is not None:
            raise EvaluationError(f"{_misfit(pipeline, lora)}, such as {name}: give the base model that it was trained on")
    with _converted(pipeline, lora, unknown) if unknown else _hooked(lora, {name: layers[pairs[name]] for name in pairs}):
        yield


def _misfit(pipeline: Pipeline, lora: Lora) -> str:
    return f"{lora.path}: is a LoRA for {lora.family}, the base model is {family_of_pipeline(pipeline)} ({type(pipeline).__name__})"


def _layers(pipeline: Pipeline) -> dict[str, torch.nn.Module]:
    """Linear layers and convolutions by a name that `match_names` understands."""
    models = {"unet": denoiser_of(pipeline), **text_encoders_of(pipeline)}
    kinds = torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d
    return {
        f"{prefix}.{name}": layer
        for prefix, model in models.items()
        for name, layer in model.named_modules()
        if isinstance(layer, kinds)
    }


def _fits(update: LowRankUpdate, layer: torch.nn.Module) -> bool:
    return _size(update) == _size(layer)


def _size(of: LowRankUpdate | torch.nn.Module) -> tuple[int, int]:
    """(out, in * kernel)."""
    if isinstance(of, LowRankUpdate):
        return of.up.shape[0], of.down_matrix.shape[1]
    weight: Any = of.weight
    return weight.shape[0], weight[0].numel()


@contextmanager
def _hooked(lora: Lora, layers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Each update added by the layer of its name."""
    for name, layer in layers.items():
        if not _fits(lora.updates[name], layer):
            here, there = (f"{rows} x {columns}" for rows, columns in (_size(lora.updates[name]), _size(layer)))
            raise EvaluationError(
                f"{lora.path}: {name}: is {here}, the layer of the base model {there}: "
                "give the base model that the LoRA was trained on"
            )
    handles = [layer.register_forward_hook(_adding(layer, lora.updates[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(layer: torch.nn.Module, update: LowRankUpdate) -> Callable[..., Tensor]:
    """A hook that adds the update to what the layer puts out."""
    weight: Any = layer.weight
    down, up = update.down.to(weight.device, weight.dtype), (update.up * update.scale).to(weight.device, weight.dtype)
    if isinstance(layer, torch.nn.Linear):
        down, up = down.flatten(1), up.flatten(1)
        return lambda _, inputs, output: output + F.linear(F.linear(inputs[0], down), up)
    conv: Any = layer
    if conv.groups != 1 or conv.padding_mode != "zeros":
        raise EvaluationError(
            f"a LoRA of a convolution with {conv.groups} groups and {conv.padding_mode} padding is not drawn with"
        )
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim]
    down, up = down.reshape(len(down), *weight.shape[1:]), up.reshape(*up.shape[:2], *[1] * (weight.ndim - 2))
    return lambda _, inputs, output: (
        output + convolve(convolve(inputs[0], down, None, conv.stride, conv.padding, conv.dilation), up)
    )


@contextmanager
def _converted(pipeline: Pipeline, lora: Lora, unknown: list[str]) -> Iterator[None]:
    """Through diffusers' load_lora_weights."""
    refusal = f"{lora.path}: {len(unknown)} of {len(lora.updates)} modules are not in the base model, such as {unknown[0]}"
    if lora.family in ("sd1", "sd2") or not hasattr(pipeline, "load_lora_weights"):
        raise EvaluationError(f"{refusal}: give the base model that the LoRA was trained on")
    rank = max(update.rank for update in lora.updates.values())
    tensors = as_kohya({name: _padded(update, rank) for name, update in lora.updates.items()})
    try:
        pipeline.load_lora_weights(tensors)
    except Exception as error:  # diffusers and PEFT raise errors of every kind
        raise EvaluationError(f"{refusal}, and diffusers cannot convert it ({error})") from error
    try:
        models = denoiser_of(pipeline), *text_encoders_of(pipeline).values()
        taken = sum(hasattr(layer, "lora_A") for model in models for layer in model.modules())
        if taken < len(lora.updates):  # more are right where a layer of the file is several in the model
            raise EvaluationError(f"{refusal}, and diffusers took {taken}: what it drops would be missing from the pictures")
        yield
    finally:
        pipeline.unload_lora_weights()


def _padded(update: LowRankUpdate, rank: int) -> LowRankUpdate:
    """Of this rank, with alpha = rank."""
    missing = rank - update.rank
    gain = abs(update.scale) ** 0.5
    down = torch.cat([update.down * gain, update.down.new_zeros(missing, *update.down.shape[1:])])
    up = update.up * (gain if update.scale >= 0 else -gain)
    return LowRankUpdate(down, torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], dim=1), float(rank))
