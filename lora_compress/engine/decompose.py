"""How the modules of a source are taken apart into components: by singular values, or by what activations make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import SettingsError
from ..settings import CompressionSettings
from ..sources import LoraSource
from ..spectrum import Spectrum, known_svd, thin_svd
from ..update import LowRankUpdate
from ..weighting import Calibration, weighted_spectrum
from .analysis import Decomposition, by_svd

__all__ = ["decomposition_of"]


def decomposition_of(
    lora: LoraSource, settings: CompressionSettings, calibration: Calibration | None
) -> Callable[[Mapping[str, LowRankUpdate]], dict[str, Decomposition]]:
    """Return the function that takes modules of one shape apart.

    It weighs components by activations where a calibration is given, and leaves modules as they are that came as a decomposition.
    """
    whole = not settings.pruning.channel_threshold
    if calibration is not None and not whole:
        raise SettingsError(["channel_threshold and a calibration cannot be used together: the calibration is of all channels"])

    def decompose(updates: Mapping[str, LowRankUpdate]) -> dict[str, Decomposition]:
        if calibration is None and not (whole and any(lora.is_balanced(name) for name in updates)):
            return by_svd(updates)
        return {name: one(name, update) for name, update in updates.items()}

    def one(name: str, update: LowRankUpdate) -> Decomposition:
        if calibration is not None:
            found = weighted_spectrum(update, calibration.gram(name, update))
            return Spectrum(found.norms, found.mix_down, found.mix_up, update), found.sigma
        spectrum = known_svd(update) if whole and lora.is_balanced(name) else thin_svd(update)
        return spectrum, spectrum.sigma

    return decompose
