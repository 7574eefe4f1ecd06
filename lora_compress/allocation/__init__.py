"""Budgets over all modules at once: which components a file keeps, in how many bits, at which quantization step."""

from .bits import bits_for_error, bits_for_size
from .common import common_ranks_for_error, common_ranks_for_size
from .fit import StepFit, fit_step
from .ranks import ranks_for_error, ranks_for_size, truncation_points

__all__ = [
    "StepFit",
    "bits_for_error",
    "bits_for_size",
    "common_ranks_for_error",
    "common_ranks_for_size",
    "fit_step",
    "ranks_for_error",
    "ranks_for_size",
    "truncation_points",
]
