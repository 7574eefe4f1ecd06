"""The second step of the road, encode: each module as the file gets it, made from its components by its plan."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import FormatError
from ..layouts.plain import FP8, KOHYA_KEYS, PlainKeys, fp8_alpha, plain_rows, update_of_rows
from ..packed.chunks import Chunk, Spool
from ..packed.index import ModuleRecord
from ..packed.module import encode_module, spread_channels, take_channels
from ..parallel import NEIGHBOURS, each_module, stream_batches
from ..quantization import ModulePlan
from ..settings import CompressionSettings
from ..spectrum import balanced_rows
from ..update import LowRankUpdate, difference, differences
from .analysis import Analyser, Components, Decomposition, alike, by_svd, kept_part, sampled

__all__ = ["EncodedModule", "Encoder", "pad_to_two"]

Rows = tuple[Tensor, Tensor]  # down and up^T, of modules of one shape: (b, k, in * kernel) and (b, k, out)
_SAMPLE = 8  # one of this many modules is coded in full, to correct what is predicted of the others
_LEAST_SAMPLE = 4


@dataclass(frozen=True)
class EncodedModule:
    """One module as the file gets it.

    Args:
        rank: components that it kept.
        squared_error: ||dW - dW'||_F^2.
        plain: the factors of a plain file; None in a packed one.
        entry: of the index of a packed file; None in a plain one.
        chunks: of its payload.
        alpha: that a reader of the file finds; of fp8 before it is known, one that takes as much room.
        padded: its rank there, zeros included.
        payload: bytes of the chunks that coding made, of a plain module too.
    """

    rank: int
    squared_error: float
    plain: LowRankUpdate | None = None
    entry: ModuleRecord | None = None
    chunks: tuple[Chunk, ...] = ()
    alpha: float = 1.0
    padded: int = 0
    payload: int = 0

    def without_factors(self) -> EncodedModule:
        """Return a copy without the factors of a plain file, which can be made again."""
        return replace(self, plain=None)


def _corrected(found: Mapping[str, EncodedModule], exact: Mapping[str, EncodedModule]) -> dict[str, EncodedModule]:
    """Correct predictions by the modules that were coded in full, and put these in their places."""
    size, error = (
        sum(getattr(stored, field) for stored in exact.values()) / max(sum(getattr(found[n], field) for n in exact), tiny)
        for field, tiny in (("payload", 1), ("squared_error", 1e-300))
    )
    result = {}
    for name, stored in found.items():
        chunks = tuple(Chunk.predicted(round(len(chunk) * size)) for chunk in stored.chunks)
        corrected = replace(stored, chunks=chunks, payload=round(stored.payload * size), squared_error=stored.squared_error * error)
        result[name] = exact.get(name, corrected)
    return result


def pad_to_two(ranks: Mapping[str, int]) -> dict[str, int]:
    """Raise ranks to 2 at least: stable-diffusion.cpp misreads the scale of rank 1."""
    return {name: max(rank, 2) for name, rank in ranks.items()}


class Encoder:
    """Analyses the modules of one LoRA when it is made, and encodes them by whatever plan it is given afterwards.

    Args:
        updates: by module name. A source is read twice, a module at a time.
        settings: what to remove and how to store the rest.
        dtype: of plain factors. It may be changed until modules are encoded.
        decompose: takes updates of one shape apart; by default the singular value decomposition.
        keys: returns the keys that a module has in a plain file.
        pad: returns the ranks that plain modules get in the file, given those that they keep; components of zeros fill them up.
        spool: makes a file in which the chunks of a run wait; None keeps them in memory.
        progress: called with (modules done, modules in all) in the first pass and in every run, of which a search for a budget
            takes several.

    Raises:
        FormatError: an update holds NaN or infinity.
    """

    def __init__(
        self,
        updates: Mapping[str, LowRankUpdate],
        settings: CompressionSettings,
        dtype: torch.dtype = torch.float32,
        decompose: Callable[[Mapping[str, LowRankUpdate]], dict[str, Decomposition]] = by_svd,
        keys: Callable[[str], PlainKeys] = lambda name: KOHYA_KEYS,
        pad: Callable[[Mapping[str, int]], Mapping[str, int]] = pad_to_two,
        spool: Callable[[], Spool] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.updates, self.settings, self.dtype = updates, settings, dtype
        self.decompose, self.keys, self.pad, self.spool, self.progress = decompose, keys, pad, spool, progress
        analyser = Analyser(settings, decompose, keys)
        self.components: dict[str, Components] = {}
        for name, found in stream_batches(lambda names: analyser.analyse(names, updates), list(updates), NEIGHBOURS):
            self.components[name] = found
            if progress:
                progress(len(self.components), len(updates))

    @property
    def packed(self) -> bool:
        """Whether the file is a packed one."""
        return self.settings.save_format in ("packed", "both")

    def run(
        self,
        choices: Mapping[str, ModulePlan],
        *,
        predict: bool = False,
        alpha: float | None = None,
        sink: Callable[[str, EncodedModule], EncodedModule] | None = None,
    ) -> Iterator[tuple[str, EncodedModule]]:
        """Encode the modules that `choices` keep, and yield them in their order.

        Entropy coding may round a module to zero, which is then left out.

        Args:
            choices: plans by module name.
            predict: estimate sizes only; see `packed.module.encode_module`.
            alpha: of a plain file, as `file_alpha` returns it, where that is known already.
            sink: called with each module in the thread that made it, to write it; what it returns takes the module's place.
        """

        def store(names: Sequence[str]) -> dict[str, EncodedModule]:
            if coded:
                made = {name: self._coded(name, kept[name], padded[name], own_alpha, predict) for name in names}
            else:
                made = self._truncated({name: (kept[name].rank, padded[name]) for name in names}, own_alpha)
            return {name: sink(name, stored) if sink and stored.rank else stored for name, stored in made.items()}

        coded = self.settings.quantization.enabled
        kept = {name: choice for name, choice in choices.items() if choice.rank}
        padded = self.pad({name: choice.stored for name, choice in kept.items()})
        own_alpha = self.file_alpha(kept) if alpha is None else alpha
        spool = self.spool() if self.spool and self.packed and not predict else None
        made = stream_batches(store, list(kept)) if coded else stream_batches(store, list(kept), NEIGHBOURS)
        for done, (name, stored) in enumerate(made, 1):
            if stored.rank:
                yield name, replace(stored, chunks=tuple(map(spool.keep, stored.chunks))) if spool else stored
            if self.progress:
                self.progress(done, len(kept))

    def predict(self, choices: Mapping[str, ModulePlan]) -> dict[str, EncodedModule]:
        """Estimate the sizes and errors that `run` would give of entropy-coded modules, in a third of its time.

        The modules are quantized, but neither refined nor coded. One in eight is, and corrects the sizes and errors of the others.
        """
        found = {name: stored.without_factors() for name, stored in self.run(choices, predict=True)}
        settings = self.settings.quantization
        if not (settings.refine or settings.progressive):
            return found
        sample = sampled(list(found), max(min(_SAMPLE, len(found) // _LEAST_SAMPLE), 1))
        exact = {name: stored.without_factors() for name, stored in self.run({name: choices[name] for name in sample})}
        return _corrected(found, exact)

    def outline(self, choices: Mapping[str, ModulePlan]) -> dict[str, EncodedModule]:
        """Return what the size of a plain file depends on, without encoding its modules. Errors are not known: they are 0.

        The alpha of fp8 is not known either: a number that takes as much room in the header stands for it.
        """
        alpha = 0.123456789 if self.dtype == FP8 else 1.0
        kept = {name: choice for name, choice in choices.items() if choice.stored}
        return self.padded({n: EncodedModule(c.stored, 0.0, alpha=alpha, payload=self._payload(n, c)) for n, c in kept.items()})

    def padded(self, stored: Mapping[str, EncodedModule]) -> dict[str, EncodedModule]:
        """Return plain modules, without their factors, with the ranks that they get in the file."""
        ranks = self.pad({name: module.rank for name, module in stored.items()})
        own = {name: self.components[name].shape.keys.alpha is None for name in stored}
        return {
            name: replace(module, plain=None, padded=ranks[name], alpha=float(ranks[name]) if own[name] else module.alpha)
            for name, module in stored.items()
        }

    def _payload(self, name: str, choice: ModulePlan) -> int:
        """Return the bytes of a module in codes of the bits that were chosen for it, 0 where none were."""
        if not choice.bits:
            return 0
        storage = self.settings.quantization
        return storage.method.payload_size(choice.rank, *self.components[name].shape.stored, storage, choice.bits)

    def file_alpha(self, choices: Mapping[str, ModulePlan]) -> float:
        """Return the alpha that all modules of a plain file have."""
        if self.packed or self.dtype != FP8:
            return 1.0
        kept = {name: choice for name, choice in choices.items() if choice.rank}
        padded = self.pad({name: choice.stored for name, choice in kept.items()})
        products = each_module(lambda name, choice: padded[name] * self._product(name, choice.rank), kept)
        return fp8_alpha(list(products.values()))

    def _rows(self, names: Sequence[str], rank: int) -> Rows:
        """Return the strongest components of modules of one shape over the kept channels, on the device that computes."""
        components = {name: self.components[name] for name in names}
        device = self.settings.quantization_device
        parts = [(a.spectrum, kept_part(self.updates[name], a.shape.kept, device)) for name, a in components.items()]
        spectra = [spectrum.of(part).to(device) for spectrum, part in parts]
        return balanced_rows(spectra, rank)

    def _product(self, name: str, rank: int) -> float:
        """Return max|down| * max|up|."""
        down, up = self._rows([name], rank)
        return float(down.abs().amax()) * float(up.abs().amax())  # which may be more than float32 holds

    def _coded(self, name: str, choice: ModulePlan, padded: int, alpha: float, predict: bool) -> EncodedModule:
        """Quantize a module, for a packed file or as the plain factors that its codes stand for."""
        analysis = self.components[name]
        (down,), (up,) = self._rows([name], len(analysis.spectrum.sigma))  # a coarse grid's noise reaches the weakest
        up = up.contiguous()
        rows = down[: choice.rank], up[: choice.rank]
        coded = encode_module(analysis.shape, *rows, choice, self.settings.quantization, predict=predict)
        if not coded.entry.rank:
            return EncodedModule(0, analysis.norm)
        order = [*coded.places, *sorted(set(range(len(down))).difference(coded.places))]
        exact, found = _on_cpu(down[order], up[order]), _on_cpu(*coded.rows)
        if not self.packed:
            made = self._plain([name], _batch(exact), _batch(found), padded, alpha)[name]
            return replace(made, payload=sum(map(len, coded.chunks)))
        lost = analysis.lost + difference(*exact, *found)
        chunks = tuple(Chunk.predicted(len(chunk)) if predict else Chunk.of(chunk) for chunk in coded.chunks)
        rank = coded.entry.rank
        return EncodedModule(rank, lost, None, coded.entry, chunks, float(rank), payload=sum(map(len, chunks)))

    def _truncated(self, ranks: Mapping[str, tuple[int, int]], alpha: float) -> dict[str, EncodedModule]:
        """Return plain modules of their first components.

        Args:
            ranks: by module name, how many components it keeps and how many rows it gets in the file.
            alpha: of the file.
        """

        def kind(name: str) -> Hashable:
            analysis = self.components[name]
            shape = analysis.shape
            own = shape.keys.alpha is None, analysis.spectrum.narrow
            return ranks[name], shape.outputs, shape.inputs, shape.kernel, shape.rank, shape.kept, own

        found: dict[str, EncodedModule] = {}
        for names in alike((name, kind(name), self.components[name].shape.weights) for name in ranks):
            rank, padded = ranks[names[0]]
            rows = _on_cpu(*self._rows(names, rank))
            found |= self._plain(names, rows, rows, padded, alpha)
        return found

    def _plain(self, names: Sequence[str], exact: Rows, found: Rows, padded: int, alpha: float) -> dict[str, EncodedModule]:
        """Return modules of one shape as a plain file stores them, with the errors that this costs.

        Args:
            exact: down (b, k, in * kernel) and up^T (b, k, out) of the strongest components.
            found: the same after coding, k' of them.
            padded: rows in the file.
            alpha: of the file.
        """
        shape = self.components[names[0]].shape
        own_alpha = None if shape.keys.alpha is None else alpha
        try:
            plain = plain_rows(*spread_channels(shape, *found), self.dtype, own_alpha, padded)
        except FormatError as error:
            if len(names) == 1:
                raise FormatError(f"{names[0]}: {error}") from None
            for i, name in enumerate(names):  # find the one that is to be named
                self._plain([name], _of_one(exact, i), _of_one(found, i), padded, alpha)
            raise
        updates = [update_of_rows(down, up, shape.kernel, own_alpha) for down, up in zip(*plain, strict=True)]
        rank = found[0].shape[1]  # without the padding
        down, up = (rows[:, :rank].float() for rows in take_channels(shape, *plain))
        components, beyond = [self.components[name] for name in names], exact[0].shape[1]
        lost = differences(*exact, down * updates[0].scale, up)
        more = [a.lost + float(a.spectrum.sigma[beyond:].square().sum()) for a in components]
        return {
            name: EncodedModule(rank, error + rest, update, alpha=update.alpha, padded=padded)
            for name, update, error, rest in zip(names, updates, lost.tolist(), more, strict=True)
        }


def _on_cpu(down: Tensor, up: Tensor) -> Rows:
    return down.cpu(), up.cpu()


def _batch(rows: Rows) -> Rows:
    return rows[0].unsqueeze(0), rows[1].unsqueeze(0)


def _of_one(rows: Rows, index: int) -> Rows:
    return _batch((rows[0][index], rows[1][index]))
