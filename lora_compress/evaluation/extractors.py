"""What turns pictures into features: Inception, CLIP, DINOv2, the probe of tiny-sd, or any function; found by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..errors import EvaluationError
from .probe import load_probe

__all__ = ["EXTRACTORS", "FeatureExtractor", "load_extractor"]

Weights = str | os.PathLike[str] | None
Function = Callable[[Tensor], Tensor]

_CLIP, _DINO = "openai/clip-vit-large-patch14-336", "facebook/dinov2-large"
_INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"  # 95 MB
_PROBE = Path("assets") / "tiny-sd" / "probe.safetensors"


@dataclass(frozen=True)
class FeatureExtractor:
    """Pictures to features.

    Args:
        name: such as clip; metrics are called after it.
        function: uint8 pictures (n, 3, H, W) to features (n, d).
    """

    name: str
    function: Function

    def metric(self, kind: str) -> str:
        """What a metric is called: fid and kid only with Inception, cmmd only with CLIP; otherwise <extractor>_fd, _kd, _mmd."""
        own = {("inception", "fd"): "fid", ("inception", "kd"): "kid", ("clip", "mmd"): "cmmd"}
        return own.get((self.name, kind), f"{self.name}_{kind}")

    @cached_property
    def identity(self) -> str:
        """A hash of the features of one fixed picture: another one where the weights are others, whatever file they came from."""
        pattern = torch.arange(3 * 64 * 64, dtype=torch.int64).mul(2654435761).remainder(251).to(torch.uint8)
        found = self(pattern.reshape(1, 3, 64, 64)).double().flatten()
        rounded = " ".join(f"{value:.2e}" for value in found[:64].tolist())
        return hashlib.sha256(f"{self.name} {len(found)} {rounded}".encode()).hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, pictures: Tensor | Iterable[Tensor]) -> Tensor:
        """Features (N, d), float32 on the CPU, of pictures (N, 3, H, W) or of batches of them.

        Raises:
            EvaluationError: pictures are not uint8 (n, 3, H, W), or the function returns no matrix with a row for each.
        """
        batches = pictures.split(32) if isinstance(pictures, Tensor) else pictures
        rows = []
        for batch in batches:
            if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
                raise EvaluationError(f"pictures are {batch.dtype} {tuple(batch.shape)}: extractors read uint8 (n, 3, H, W)")
            found = self.function(batch)
            if found.ndim != 2 or len(found) != len(batch):
                raise EvaluationError(
                    f"extractor {self.name}: made {tuple(found.shape)} of {len(batch)} pictures: it must return one row for each"
                )
            rows.append(found.float().cpu())
        return torch.cat(rows)


def load_extractor(name: str | Function, weights: Weights = None, device: str = "cpu") -> FeatureExtractor:
    """An extractor by name, or around a function.

    Args:
        name: inception, clip, dinov2 or probe; or uint8 pictures (n, 3, H, W) -> features (n, d), called as it calls itself.
        weights: inception: the .pth file of torch-fidelity; clip, dinov2: a folder or a name on the Hugging Face hub; probe: its
            file. None: those that each is known by, downloaded where that is possible.
        device: where it runs.

    Raises:
        EvaluationError: an unknown name, a package that is missing, or weights that are not there and cannot be downloaded:
            what to download, and where to put it.
    """
    if not isinstance(name, str):
        return FeatureExtractor(getattr(name, "__name__", type(name).__name__).strip("<>").lower(), name)
    if name not in EXTRACTORS:
        raise EvaluationError(f"extractor {name}: is unknown: known are {', '.join(EXTRACTORS)}, or a function of your own")
    return FeatureExtractor(name, EXTRACTORS[name](weights, device))


def _inception(weights: Weights, device: str) -> Function:
    """The 2048 features of the network that FID is defined by, with its TensorFlow resizing (Heusel et al., arXiv 1706.08500)."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise EvaluationError(f"extractor inception: needs torch-fidelity ({error}): pip install torch-fidelity") from error
    hint = f"download {_INCEPTION} and name the file: --weights inception=FILE, or take another --extractor"
    if weights is not None and not Path(weights).is_file():
        raise EvaluationError(f"extractor inception: {weights}: no such file: {hint}")
    if weights is not None:
        _require_tensors(Path(weights), hint)
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], None if weights is None else str(weights))
    except Exception as error:  # what urllib, torch.load and load_state_dict raise has no common base
        raise EvaluationError(f"extractor inception: weights cannot be had ({_first_line(error)}): {hint}") from error
    model = model.to(device)
    return lambda pictures: model(pictures.to(device))[0].flatten(1)


def _require_tensors(path: Path, hint: str) -> None:
    """Refuse a file that holds more than tensors, because torch-fidelity runs whatever a pickle tells it to run.

    Raises:
        EvaluationError: the file is no dictionary of tensors, or holds other objects.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise EvaluationError(f"extractor inception: {path}: holds more than tensors ({_first_line(error)}): {hint}") from error
    except Exception as error:  # what torch.load raises has no common base
        raise EvaluationError(f"extractor inception: weights cannot be had ({_first_line(error)}): {hint}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise EvaluationError(f"extractor inception: {path}: is no dictionary of tensors: {hint}")


def _clip(weights: Weights, device: str) -> Function:
    """Image embeddings of CLIP ViT-L/14 at 336 pixels (CMMD, arXiv 2401.09603)."""
    from transformers import CLIPVisionModelWithProjection

    return _transformer("clip", CLIPVisionModelWithProjection, weights or _CLIP, device, lambda found: found.image_embeds)


def _dinov2(weights: Weights, device: str) -> Function:
    """The class token of DINOv2 ViT-L/14 (Stein et al., arXiv 2306.04675)."""
    from transformers import Dinov2Model

    return _transformer("dinov2", Dinov2Model, weights or _DINO, device, lambda found: found.pooler_output)


def _transformer(name: str, kind: Any, weights: Weights, device: str, read: Callable[[Any], Tensor]) -> Function:
    from transformers import AutoImageProcessor

    source = str(weights)
    try:
        processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
        model = kind.from_pretrained(source).eval().requires_grad_(False).to(device)
    except (OSError, ValueError, ImportError) as error:
        hub = source if not Path(source).exists() else _CLIP if name == "clip" else _DINO
        raise EvaluationError(
            f"extractor {name}: {source} cannot be loaded ({_first_line(error)}): on a machine with network, run "
            f"huggingface-cli download {hub} --local-dir {name}, bring the folder here and name it: --weights {name}=FOLDER"
        ) from error

    def extract(pictures: Tensor) -> Tensor:
        arrays = [picture.permute(1, 2, 0).numpy() for picture in pictures]
        return read(model(**processor(images=arrays, return_tensors="pt").to(device)))

    return extract


def _probe(weights: Weights, device: str) -> Function:
    """The classifier of the drawings that tiny-sd knows; pictures are scaled to its 64 x 64."""
    path = Path(weights) if weights else Path(__file__).parents[2] / _PROBE
    try:
        model = load_probe(path).to(device)
    except FileNotFoundError as error:
        raise EvaluationError(
            f"extractor probe: {path}: no such file: it is {_PROBE.as_posix()} of this project's repository: name it, "
            "--weights probe=FILE"
        ) from error

    def extract(pictures: Tensor) -> Tensor:
        scaled = pictures.to(device).float() / 255.0
        if scaled.shape[2:] != (64, 64):
            scaled = torch.nn.functional.interpolate(scaled, (64, 64), mode="bicubic", antialias=True).clamp(0.0, 1.0)
        return model.features(scaled)

    return extract


EXTRACTORS: dict[str, Callable[[Weights, str], Function]] = {
    "inception": _inception,
    "clip": _clip,
    "dinov2": _dinov2,
    "probe": _probe,
}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
