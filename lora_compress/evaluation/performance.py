"""Evaluate a LoRA: what its file weighs, what its weights lost, what its pictures lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import EvaluationError
from ..files.regular import size_of
from ..inspection.comparison import compare_files
from ..settings.cache_folder import cache_folder
from ..sources.open import open_lora
from .attachment import Lora, read_lora
from .base_model import load_base_model
from .extractors import FeatureExtractor, load_extractor
from .measuring import distances, paired_measures
from .pictures import PictureFolder, read_pictures
from .prompts import read_prompts, stock_prompts
from .reference import reference_features
from .results import Evaluation
from .studio import Drawings, Studio

__all__ = ["EvaluationOptions", "evaluate_lora_performance"]

PathLike = str | os.PathLike[str]
_ENOUGH = 2000  # pictures, from which FID is more signal than bias
_SHOWN = 8


@dataclass(frozen=True)
class EvaluationOptions:
    """How pictures are drawn and measured.

    Args:
        count: pictures drawn of each model; None for 64.
        seed: the first; every picture has its own.
        steps: of the sampler.
        guidance: scale; None for the pipeline's own.
        resolution: of the pictures, and of those of the data set; None for the pipeline's own.
        batch: pictures drawn at a time.
        prompts_compared: prompts that the relative output error is measured on.
        extractors: names, or functions.
        weights: of extractors, by name.
        device: where everything runs.
        dtype: of the base model.
        cache: folder of reference statistics; None for the usual one, False for none.
    """

    count: int | None = None
    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    resolution: int | None = None
    batch: int = 8
    prompts_compared: int = 8
    extractors: Sequence[str | Callable[[torch.Tensor], torch.Tensor]] = ()
    weights: Mapping[str, PathLike] = field(default_factory=dict)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    cache: PathLike | bool | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 2:
            raise EvaluationError(f"count={self.count}: a distance between sets needs 2 pictures or more, 50 to mean anything")
        for name in ("steps", "batch", "prompts_compared"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise EvaluationError(f"resolution={self.resolution}: must be a multiple of 8")
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
            raise EvaluationError(f"device={self.device}: torch cannot use it here ({error}): use cpu") from error

    @property
    def cache_path(self) -> Path | None:
        """Where reference statistics are kept."""
        if self.cache is False:
            return None
        return cache_folder() if self.cache in (None, True) else Path(str(self.cache))


def evaluate_lora_performance(
    lora_path: PathLike,
    dataset: PathLike | None = None,
    *,
    base_model: PathLike | None = None,
    original: PathLike | None = None,
    prompts: PathLike | Sequence[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Evaluation:
    """What a LoRA weighs, and what it lost: of its weights, of its pictures.

        evaluate_lora_performance("small.safetensors", "photos/", base_model="sd15/", original="lora.safetensors").metrics

    Without a data set: size, the error of the weights against `original`, and with a base model the paired measures of the same
    prompts and seeds (relative output error, SSIM, cosine of features, LPIPS where its package is). With a data set also the
    distances of the pictures from it: FID, KID, CMMD, each beside those of the original and of the base model.

    Args:
        lora_path: a LoRA file of any layout, packed or plain.
        dataset: folder of real pictures with captions; captions are the prompts.
        base_model: a diffusers folder, a checkpoint or a name on the hub; to draw with.
        original: the LoRA that `lora_path` was made from.
        prompts: a text file with one a line, or texts; instead of captions or stock prompts.
        progress: called with (what is drawn, pictures drawn, pictures in all).
        options: see `EvaluationOptions`; extractors is inception with a data set unless told otherwise.

    Raises:
        FormatError: a LoRA cannot be read, or the two have nothing in common.
        EvaluationError: what else is missing or does not fit: pictures, captions, base model, extractor.
    """
    chosen = EvaluationOptions(**options)
    if dataset is not None and base_model is None:
        raise EvaluationError(f"{dataset}: pictures are compared with drawn ones: name the base model to draw with")
    found = _weighed(str(lora_path), None if original is None else str(original))
    if base_model is None:
        return found
    lora, full = read_lora(found.path), None if found.original is None else read_lora(found.original)
    folder = None
    if dataset is not None:
        folder = read_pictures(dataset, resolution=chosen.resolution, captions=prompts is None)
    names = chosen.extractors or (["inception"] if folder is not None else [])
    extractors = [load_extractor(name, chosen.weights.get(str(name)), chosen.device) for name in names]
    references = [reference_features(folder, extractor, chosen.cache_path) for extractor in extractors] if folder else []
    texts = _prompts(prompts, folder, full or lora, chosen)
    pipeline = load_base_model(base_model, family=(full or lora).family, device=chosen.device, dtype=chosen.dtype)
    studio = Studio(pipeline, texts, chosen.seed, _draw_options(chosen), progress)
    drawings = studio.draw_all(lora, full, spare=folder is not None)
    estimates, notes, curve = paired_measures(studio, drawings, lora, full, extractors, chosen.prompts_compared, chosen.device)
    for extractor, reference in zip(extractors, references, strict=False):
        estimates += distances(drawings, extractor, reference)
    return replace(
        found,
        estimates=tuple(estimates),
        by_timestep=tuple(curve),
        notes=(*notes, *_notes(drawings, folder)),
        settings=_told(chosen, base_model, dataset, extractors, drawings),
        pictures={name: pictures[:_SHOWN] for name, pictures in drawings.shown().items()},
    )


def _weighed(path: str, original: str | None) -> Evaluation:
    """Sizes, and the error of the weights."""
    if original is None:
        with closing(open_lora(path)) as source:
            return Evaluation(path, None, size_of(source.path))
    comparison = compare_files(original, path)
    return Evaluation(path, original, comparison.bytes[1], comparison.bytes[0], comparison.relative_error)


def _prompts(
    given: PathLike | Sequence[str] | None, folder: PictureFolder | None, lora: Lora, options: EvaluationOptions
) -> list[str]:
    """N texts of those given, the captions, or stock prompts; evenly picked where they are more, again from the first if fewer."""
    if given is not None:
        texts = read_prompts(given) if isinstance(given, (str, os.PathLike)) else list(given)
    else:
        texts = list(folder.captions) if folder is not None else stock_prompts(lora.metadata)
    count = options.count or 64
    return [texts[i * len(texts) // count if count < len(texts) else i % len(texts)] for i in range(count)]


def _draw_options(options: EvaluationOptions) -> dict[str, Any]:
    names = ("steps", "guidance", "resolution", "batch")
    return {name: getattr(options, name) for name in names}


def _notes(drawings: Drawings, folder: PictureFolder | None) -> list[str]:
    if folder is None:
        return []
    count = min(drawings.count, len(folder))
    if count >= _ENOUGH:
        return []
    return [
        f"{count} pictures: below {_ENOUGH} FID is mostly bias, compare it with its floor; KID is unbiased and the one to trust"
    ]


def _told(
    options: EvaluationOptions,
    base_model: PathLike,
    dataset: PathLike | None,
    extractors: Sequence[FeatureExtractor],
    drawings: Drawings,
) -> dict[str, Any]:
    return {
        "base_model": str(base_model),
        "dataset": None if dataset is None else str(dataset),
        "extractors": ", ".join(extractor.name for extractor in extractors) or None,
        "pictures": drawings.count,
        "seed": options.seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "resolution": options.resolution,
        "dtype": str(options.dtype).removeprefix("torch."),
        "device": options.device,
    }
