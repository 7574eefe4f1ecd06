"""Features of a data set, kept between runs in an .npz file whose name is made of what was in the pictures."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files.writer import atomic_path
from .extractors import FeatureExtractor
from .pictures import PictureFolder

__all__ = ["reference_features"]

logger = logging.getLogger(__name__)


def reference_features(pictures: PictureFolder, extractor: FeatureExtractor, cache: Path | None) -> Tensor:
    """Features (N, d) of the pictures, from `cache` if this extractor has read the same pictures before.

    Args:
        pictures: of the data set.
        extractor: of features.
        cache: folder of .npz files; None reads and writes none.

    Raises:
        EvaluationError: a picture cannot be read.
        SaveError: the cache cannot be written.
    """
    path = cache / f"{extractor.name}-{extractor.identity}-{pictures.key[:32]}.npz" if cache else None
    if path is not None and path.is_file():
        try:
            with np.load(path) as stored:
                found = torch.from_numpy(stored["features"])
            if len(found) == len(pictures):
                return found
            logger.warning("%s: is of %d pictures, not of %d: measured again", path, len(found), len(pictures))
        except (OSError, ValueError, KeyError, EOFError) as error:
            logger.warning("%s: cannot be read (%s): measured again", path, error)
    features = extractor(pictures.batches())
    if path is not None:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, features=features.numpy())
    return features
