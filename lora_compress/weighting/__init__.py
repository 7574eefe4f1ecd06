"""What a component is worth beyond its singular value: relative to the base model, and by the activations that reach it."""

from .activation import WeightedSpectrum, diagonal_gram, weighted_spectrum
from .base import BaseNorm, base_norms, relative_scores, relative_weights
from .calibration import Calibration, Moments, factors_digest, save_calibration

__all__ = [
    "BaseNorm",
    "Calibration",
    "Moments",
    "WeightedSpectrum",
    "base_norms",
    "diagonal_gram",
    "factors_digest",
    "relative_scores",
    "relative_weights",
    "save_calibration",
    "weighted_spectrum",
]
