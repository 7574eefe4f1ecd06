"""The first step of the road, analyze: the singular values of every module and the components that they belong to.

What this step learns is small beside the weights, so that all modules of a file can be held at once while their ranks and bits are
chosen; the weights themselves are read again when a module is encoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import NOT_FINITE, FormatError
from ..layouts.plain import PlainKeys
from ..packed.index import ModuleRecord
from ..pruning import select_channels
from ..settings import CompressionSettings
from ..spectrum import Spectrum, quick_svds, thin_svd
from ..update import LowRankUpdate

__all__ = ["Analyser", "Components", "Decompose", "Decomposition", "alike", "by_svd", "kept_part", "sampled"]

Decomposition = tuple[Spectrum, Tensor]  # the components of a module, best first, and the falling scores that order them
Decompose = Callable[[Mapping[str, LowRankUpdate]], dict[str, Decomposition]]
Channels = tuple[tuple[int, ...] | None, tuple[int, ...] | None]  # outputs, inputs; None for all
Item = TypeVar("Item")
_GOLDEN = 0.6180339887498949  # the golden ratio less one: its multiples repeat no period of the names
_GROUP_WEIGHTS = 1 << 21  # of modules of one shape, which are held in float32


@dataclass(frozen=True)
class Components:
    """What the first pass learns of a module.

    Args:
        spectrum: its singular values and the mixtures of its rows, over the channels that are kept; without the factors.
        scores: (k,), falling: what its components are chosen by.
        shape: name, sizes, rank in the input and kept channels, as a record of an index without a codec.
        lost: ||dW||_F^2 of the channels that are not kept, and of what was left out when the module was read.
        norm: ||dW||_F^2 of the whole module.
        alpha: of the module in the input.
    """

    spectrum: Spectrum
    scores: Tensor
    shape: ModuleRecord
    lost: float
    norm: float
    alpha: float


def by_svd(updates: Mapping[str, LowRankUpdate]) -> dict[str, Decomposition]:
    """Take updates of one shape apart by their singular value decompositions; the scores are the singular values."""
    found = zip(updates.items(), quick_svds([*updates.values()]), strict=True)
    spectra = {name: quick or thin_svd(update) for (name, update), quick in found}
    return {name: (spectrum, spectrum.sigma) for name, spectrum in spectra.items()}


class Analyser:
    """Takes modules apart.

    Args:
        settings: say which channels are left out and which device computes.
        decompose: takes updates of one shape apart; the singular value decomposition unless something else is to be kept.
        keys: returns the keys that a module has in a plain file.
    """

    def __init__(self, settings: CompressionSettings, decompose: Decompose, keys: Callable[[str], PlainKeys]) -> None:
        self._settings, self._decompose, self._keys = settings, decompose, keys

    def analyse(self, names: Sequence[str], updates: Mapping[str, LowRankUpdate]) -> dict[str, Components]:
        """Analyse some modules, those of one shape at once: a module alone costs as much in calls as in arithmetic.

        Args:
            names: of neighbours in the file.
            updates: of all modules; each is read once.

        Raises:
            FormatError: names the module that holds NaN or infinity.
        """
        found: dict[str, Components] = {}
        read = ((name, updates[name]) for name in names)
        for group in alike(((name, u), (u.down.shape, u.up.shape), u.numel) for name, u in read):
            found |= self._analyse_alike(dict(group))
        return found

    def _analyse_alike(self, updates: Mapping[str, LowRankUpdate]) -> dict[str, Components]:
        channels, parts = {}, {}
        for name, update in updates.items():
            channels[name] = self._channels(name, update)
            parts[name] = kept_part(update, channels[name][0], self._settings.quantization_device)
        found = {}
        for name, (spectrum, scores) in self._decomposed(parts).items():
            update, (kept, lost) = updates[name], channels[name]
            lost += update.rest
            norm = lost + float(spectrum.sigma.square().sum())
            sizes = (update.up.shape[0], update.down.shape[1])
            shape = ModuleRecord(name, sizes[0], sizes[1], update.kernel, update.rank, "", {}, kept, self._keys(name))
            found[name] = Components(spectrum.to("cpu").without_factors(), scores.cpu(), shape, lost, norm, update.alpha)
        return found

    def _decomposed(self, parts: Mapping[str, LowRankUpdate]) -> dict[str, Decomposition]:
        """Take modules apart.

        Raises:
            FormatError: names the module that holds NaN or infinity.
        """
        if len({part.down.shape for part in parts.values()} | {part.up.shape for part in parts.values()}) > 2:
            return {name: self._decomposed({name: part})[name] for name, part in parts.items()}  # different channels are left
        try:
            return self._decompose(parts)
        except FormatError as error:
            if len(parts) == 1:
                raise FormatError(f"{next(iter(parts))}: {error}") from None
            return {name: self._decomposed({name: part})[name] for name, part in parts.items()}

    def _channels(self, name: str, update: LowRankUpdate) -> tuple[Channels, float]:
        """Return the output and input channels that survive channel_threshold, None for all, and the squared norm of the others."""
        threshold = self._settings.pruning.channel_threshold
        if not threshold:
            return (None, None), 0.0
        chosen = select_channels(update, threshold)
        if not math.isfinite(chosen.squared_norm):
            raise FormatError(f"{name}: {NOT_FINITE}")
        counts = (update.up.shape[0], update.down.shape[1])
        outputs, inputs = (
            None if len(kept) == count else tuple(kept.tolist())
            for kept, count in zip((chosen.outputs, chosen.inputs), counts, strict=True)
        )
        return (outputs, inputs), chosen.squared_error


def kept_part(update: LowRankUpdate, kept: Channels, device: str) -> LowRankUpdate:
    """Return the kept channels of an update, on the device that computes."""
    outputs, inputs = kept
    if outputs is None and inputs is None and update.up.device == torch.device(device):
        return update
    up = update.up if outputs is None else update.up[list(outputs)]
    down = update.down if inputs is None else update.down[:, list(inputs)]
    return LowRankUpdate(down.to(device), up.to(device), update.alpha)


def alike(items: Iterable[tuple[Item, Hashable, int]]) -> Iterator[list[Item]]:
    """Yield items of one kind together, as many as their number of weights allows.

    Args:
        items: each with its kind and its number of weights.
    """
    groups: dict[Hashable, list[Item]] = {}
    for item, kind, weights in items:
        group = groups.setdefault(kind, [])
        group.append(item)
        if weights * len(group) > _GROUP_WEIGHTS:
            yield groups.pop(kind)
    yield from groups.values()


def sampled(names: list[str], every: int) -> list[str]:
    """Return one name of each `every`, at places that are not in step with the layers of a block."""
    places = (int(first + (first * _GOLDEN) % 1 * every) for first in range(0, len(names), every))
    return [names[place] for place in places if place < len(names)]
