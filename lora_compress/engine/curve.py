"""The curve of sizes and errors that a report shows, estimated from the singular values; nothing is encoded for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ..allocation import bits_for_error, truncation_points
from ..quantization import BudgetSearch
from .encode import Encoder

__all__ = ["entropy_points", "packed_overhead", "size_curve", "with_rest"]

_ERRORS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.55, 0.75)
_HEADER_BYTES, _INDEX_BYTES = 700, 25  # of a packed file with our own metadata, and of its index for each module: typical


def size_curve(encoder: Encoder, overhead: int) -> tuple[tuple[int, float], ...]:
    """Return (bytes, relative error) of the smallest files of the same kind, as Gaussian weights would give them.

    Args:
        job: whose spectra and storage are taken.
        overhead: bytes of the file that are no factors.
    """
    lost, norm = (sum(getattr(analysis, field) for analysis in encoder.components.values()) for field in ("lost", "norm"))
    return with_rest(_spectral_curve(encoder, overhead), lost, norm)


def with_rest(points: Sequence[tuple[int, float]], rest: float, norm: float) -> tuple[tuple[int, float], ...]:
    """Return (bytes, relative error) of the whole update, given those of a part of it.

    Args:
        points: of the part that has a spectrum.
        rest: ||dW||_F^2 of what every one of the files leaves out.
        norm: ||dW||_F^2 of the whole.
    """
    share = rest / norm if rest else 0.0
    return tuple((size, math.sqrt(error**2 * (1.0 - share) + share)) for size, error in points) if share else tuple(points)


def _spectral_curve(encoder: Encoder, overhead: int) -> tuple[tuple[int, float], ...]:
    quantization, method = encoder.settings.quantization, encoder.settings.quantization.method
    if quantization.enabled and method.search is BudgetSearch.STEP_SIZE:
        return entropy_points([(a.shape.stored, a.spectrum.sigma.tolist()) for a in encoder.components.values()], overhead)
    packed = quantization.enabled and encoder.packed
    sigmas = {name: analysis.scores for name, analysis in encoder.components.items()}
    noise = 2 * method.distortions[int(quantization.bits)] if packed and quantization.bits and not method.averages else 0.0
    total = sum(analysis.norm for analysis in encoder.components.values())

    def price(name: str, bits: int | None = None) -> int:
        shape = encoder.components[name].shape
        if packed:
            return method.component_size(*shape.stored, quantization, bits)
        return (shape.outputs + shape.inputs * math.prod(shape.kernel)) * encoder.dtype.itemsize

    inner = [(error**2 - noise) ** 0.5 for error in _ERRORS if error**2 > noise] if total else []
    if method.search is not BudgetSearch.COMPONENT_BITS:
        points = truncation_points([*sigmas.values()], [price(name) for name in sigmas], inner)
        return tuple((overhead + size, (error**2 + noise) ** 0.5) for size, error in points)
    widths = {name: sum(analysis.shape.stored) for name, analysis in encoder.components.items()}
    mixed = {}
    for error in inner:
        bits = bits_for_error(sigmas, widths, method.distortions, error, component_bytes=price)
        mixed[overhead + sum(price(name, width) for name, chosen in bits.items() for width in chosen)] = error
    return tuple(mixed.items())


def packed_overhead(modules: int) -> int:
    """Return about how many bytes a packed file has beside its payload, the metadata of the input and what is carried through."""
    return _HEADER_BYTES + _INDEX_BYTES * modules


def entropy_points(spectra: Iterable[tuple[tuple[int, int], Sequence[float]]], overhead: int) -> tuple[tuple[int, float], ...]:
    """Return (bytes, relative error) of entropy-coded files, by reverse water-filling.

    A component of RMS x per weight gets 0.255 + log2(x / d) bits at the distortion d, and none below.

    Args:
        spectra: of each module the (inputs * kernel, outputs) that are stored, and its singular values.
        overhead: bytes of the file that are no factors.
    """
    modules = [(pair, np.asarray(values, dtype=np.float64)) for pair, values in spectra]
    widths = np.array([pair for pair, values in modules for _ in values], dtype=np.float64).reshape(-1, 2)
    sigma = np.concatenate([np.zeros(0), *(values for _, values in modules)])
    total, points = float(np.square(sigma).sum()), {}
    for error in _ERRORS if total else ():
        low, high = 0.0, float(np.square(sigma).max())
        for _ in range(60):  # the distortion per weight that adds up to the error
            middle = (low + high) / 2
            lost = np.minimum(widths.sum(axis=1) * middle, np.square(sigma)).sum()
            low, high = (middle, high) if lost <= error**2 * total else (low, middle)
        kept = widths.sum(axis=1) * low < np.square(sigma)
        ratio = np.square(sigma[kept, None]) / widths[kept] / max(low, np.finfo(np.float64).tiny)
        bits = (widths[kept] * np.maximum(0.5 * np.log2(np.maximum(ratio, 1.0)) + 0.255, 0.0)).sum()
        points[overhead + int(bits / 8)] = error
    return tuple(points.items())
