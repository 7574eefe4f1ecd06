"""From a session to a file: what survived goes through the engine, what was trained quantized is written as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..engine.analysis import Decomposition, by_svd
from ..engine.encode import EncodedModule
from ..engine.in_memory import CompressedLora, compress, plain_size
from ..engine.output import OutputFile
from ..errors import NOT_FINITE, FormatError, SaveError, SettingsError
from ..layouts.plain import exact_plain
from ..packed.chunks import Chunk
from ..packed.index import ModuleRecord
from ..packed.module import decode_module
from ..parallel import each_module
from ..report import CompressionReport, PartReport
from ..settings import PruningSettings, QatSettings, TrainingSettings
from ..spectrum import Spectrum
from ..update import LowRankUpdate, squared_error
from .importance import component_norms
from .pairs import Pair

if TYPE_CHECKING:
    from .session import TrainingSession

__all__ = ["Operands", "compress_trained", "trained_operands"]


@dataclass(frozen=True)
class Operands:
    """One module as the layers compute with it: kept components, strongest first.

    Args:
        down: (k, in * kernel), float32.
        up: (k, out), float32.
        down_grid: (k, width), parameters of the quantizer.
        up_grid: likewise.
        scale: alpha / r of the host.
        rank: r, of the network.
        kernel: kernel size of a convolution, () for a linear layer.
    """

    down: Tensor
    up: Tensor
    down_grid: Tensor
    up_grid: Tensor
    scale: float
    rank: int
    kernel: tuple[int, ...]

    @property
    def update(self) -> LowRankUpdate:
        """The same as an update."""
        return LowRankUpdate.from_matrices(self.down, self.up.T.contiguous(), self.scale * len(self.down), self.kernel)


def compress_trained(
    session: TrainingSession, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> CompressedLora:
    """The LoRA of a session, in memory.

    Before quantization began the kept components go through `pipeline.compress`, where nothing else is removed unless other
    settings ask for it. After that the file holds the very numbers that the layers compute with: no component is rotated,
    refitted or allocated anew, scales stay in float32.

    Args:
        session: of a training under way or at its end.
        dtype: of plain factors (save_precision); None keeps float32.
        metadata: of the trainer, for the file.

    Raises:
        FormatError: a weight is NaN or infinite.
        SettingsError: nothing is left.
        SaveError: what would be written does not decode to what was trained.
    """
    for name, pair in session.pairs.items():
        if not all(bool(weight.isfinite().all()) for weight in pair.weights):
            raise FormatError(f"{name}: {NOT_FINITE}")
    if session.quantizing:
        return _compress_operands(session, dtype, metadata or {})
    modules = _modules(session)
    counts = {name: sum(int(session.kept(pair.name).sum()) for pair in pairs) for name, pairs in modules.items()}

    def decompose(updates: Mapping[str, LowRankUpdate]) -> dict[str, Decomposition]:
        found = {}
        for name, (spectrum, scores) in by_svd(updates).items():
            count = counts[name]
            parts = (spectrum.sigma[:count], spectrum.mix_down[:count], spectrum.mix_up[:count])
            found[name] = Spectrum(*parts, spectrum.update), scores[:count]
        return found

    settings = session.settings
    if settings.training.iterative_pruning:
        pruning = PruningSettings(channel_threshold=settings.pruning.channel_threshold, min_rank=settings.pruning.min_rank)
        rest = replace(settings, pruning=pruning, training=TrainingSettings(), quantized_training=QatSettings())
    else:
        rest = replace(settings, training=TrainingSettings(), quantized_training=QatSettings())
    updates = {name: _merged([_kept_rows(session, pair) for pair in pairs], pairs) for name, pairs in modules.items()}
    lora = compress(updates, rest, dtype, metadata, decompose=decompose, details=_told(session))
    return replace(lora, settings=settings)


def trained_operands(session: TrainingSession) -> dict[str, Operands]:
    """What the layers of a session compute with, by module, without what is masked and modules of which nothing is kept."""
    found = {name: _operands(session, pairs) for name, pairs in _modules(session).items()}
    return {name: operands for name, operands in found.items() if len(operands.down)}


def _compress_operands(session: TrainingSession, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> CompressedLora:
    operands = trained_operands(session)
    if not operands:
        raise SettingsError(["nothing is left of the LoRA: choose a smaller threshold or a larger rank_ratio"])
    packed = session.settings.save_format in ("packed", "both")
    make, factors = (_coded if packed else _plain), dtype or torch.float32
    encoded = each_module(lambda name, part: make(session, name, part, factors), operands)
    updates = {name: _update(module) for name, module in encoded.items()}
    trained = _against_trained(session, updates)
    encoded = {name: replace(module, squared_error=trained[name][0]) for name, module in encoded.items()}
    modules = _modules(session)
    described = {name: _Trained(_record(name, pairs), trained[name][1], pairs[0].scale) for name, pairs in modules.items()}
    file = OutputFile(session.settings, described, lambda: factors, metadata=lambda ranks: metadata, more=_told(session))
    reports = {}
    for name, module in described.items():
        found = operands.get(name)
        saving = (0.0, 0.0) if found is None else _saving(found, updates[name], packed)
        kept = 0 if found is None else len(found.down)
        reports[name] = PartReport((1, int(found is not None)), (module.shape.rank, kept), *saving, trained[name])
    before = plain_size({name: _whole(pairs) for name, pairs in modules.items()}, dtype)
    report = CompressionReport.of_modules(reports, (before, file.size(encoded)))
    tensors, finished = file.tensors(encoded), file.finished_metadata(encoded)
    return CompressedLora(updates, tensors, finished, report, session.settings, exact=True)


class _Trained(NamedTuple):
    """A module as its file must know it: a record without a codec, ||dW||_F^2 of the trained weights, alpha / r of the host."""

    shape: ModuleRecord
    norm: float
    alpha: float


def _record(name: str, pairs: list[Pair]) -> ModuleRecord:
    """Return the record of a module without a codec, at the rank of the network."""
    update, rank = _whole(pairs)
    return ModuleRecord(name, update.up.shape[0], update.down.shape[1], update.kernel, rank, "", {})


def _saving(operands: Operands, update: LowRankUpdate, packed: bool) -> tuple[float, float]:
    """Return ||dW - dW'||_F^2 and ||dW||_F^2 of the numbers that the layers compute with against those of the file."""
    lost, norm = squared_error(operands.update, update)
    return (0.0 if packed else lost), norm  # a packed module was compared bit by bit when it was coded


def _update(module: EncodedModule) -> LowRankUpdate:
    """Return what a reader of the file gets of a module."""
    if module.plain is not None:
        return module.plain
    assert module.entry is not None
    return decode_module(module.entry, [chunk.read() for chunk in module.chunks])


def _against_trained(session: TrainingSession, updates: Mapping[str, LowRankUpdate]) -> dict[str, tuple[float, float]]:
    """By module ||dW - dW'||_F^2 and ||dW||_F^2, dW being the weights that are trained, dW' those of the file."""
    return each_module(lambda name, pairs: squared_error(_whole(pairs)[0], updates.get(name)), _modules(session))


def _plain(session: TrainingSession, name: str, operands: Operands, dtype: torch.dtype) -> EncodedModule:
    """Encode a module of a plain file: its numbers as they are, rounded to `dtype`."""
    update = exact_plain(operands.update, dtype)
    return EncodedModule(len(operands.down), 0.0, update, alpha=update.alpha, padded=update.rank)


def _coded(session: TrainingSession, name: str, operands: Operands, dtype: torch.dtype) -> EncodedModule:
    """Encode a module of a packed file.

    Raises:
        SaveError: what was coded does not decode to the very numbers that were trained.
    """
    assert session.grid is not None
    codec, parameters, chunks = session.grid.encode((operands.down, operands.up), (operands.down_grid, operands.up_grid))
    shape = operands.update
    kernel, rank = operands.kernel, len(operands.down)
    if operands.scale != 1.0:
        parameters = {**parameters, "scale": operands.scale}
    entry = ModuleRecord(name, shape.up.shape[0], shape.down.shape[1], kernel, rank, codec, parameters)
    decoded = decode_module(entry, chunks)
    if not (torch.equal(decoded.down_matrix, operands.down) and torch.equal(decoded.up_matrix.T, operands.up)):
        raise SaveError(f"{name}: what would be written is not what was trained: report this, with your settings")
    return EncodedModule(rank, 0.0, None, entry, tuple(map(Chunk.of, chunks)), decoded.alpha)


def _told(session: TrainingSession) -> dict[str, Any]:
    """What the metadata says of the training."""
    settings = session.settings
    names = ("rank_ratio", "norm_threshold", "layer_threshold", "new_rank", "new_conv_rank", "dynamic_method", "dynamic_param")
    flat = settings.as_dict()
    told = {name: flat[name] for name in names if flat[name]} if settings.training.iterative_pruning else {}
    told |= {name: value for name, value in flat.items() if name.startswith(("pruning_", "qat")) and value is not None}
    if settings.training.iterative_pruning:
        told |= {name: flat[name] for name in ("iterative_pruning", "max_iterations", "importance", "rank_return")}
    return told | {"trained_steps": session.step} | session.remarks


def _modules(session: TrainingSession) -> dict[str, list[Pair]]:
    """The pairs of each module: one, or the parts of a split one."""
    modules: dict[str, list[Pair]] = {}
    for pair in session.pairs.values():
        modules.setdefault(pair.module, []).append(pair)
    return modules


def _whole(pairs: list[Pair]) -> tuple[LowRankUpdate, int]:
    """The update of a module as the host would have written it, and its rank."""
    update = _merged([tuple(part.cpu() for part in pair.live_rows()) for pair in pairs], pairs)
    return update, update.rank


def _kept_rows(session: TrainingSession, pair: Pair) -> tuple[Tensor, Tensor]:
    """Rows of down and up on the CPU, zero where masked."""
    kept = session.kept(pair.name).unsqueeze(1)
    down, up = pair.live_rows()
    return (down * kept).cpu(), (up * kept).cpu()


def _merged(rows: list[tuple[Tensor, ...]], pairs: list[Pair]) -> LowRankUpdate:
    """One update of the parts of a module: down's rows one after the other, up block diagonal. alpha / r stays."""
    down, up = torch.cat([part[0] for part in rows]), _block_diagonal([part[1] for part in rows])
    kernel = tuple(pairs[0].weights[0].shape[2:])
    return LowRankUpdate.from_matrices(down, up.T.contiguous(), pairs[0].scale * len(down), kernel)


def _operands(session: TrainingSession, pairs: list[Pair]) -> Operands:
    grid = session.grid
    assert grid is not None
    parts = []
    for pair in pairs:
        kept = session.kept(pair.name)
        grids = [session.state.part(kind, pair.name) for kind in ("down_grid", "up_grid")]
        weights = [session.effective_weight(pair.name, side).detach().float() for side in (0, 1)]
        rows = [pair.rows(side, weight)[kept] for side, weight in enumerate(weights)]
        parts.append([tensor.cpu() for tensor in (*rows, *(part[kept] for part in grids))])
    down, down_grid = (torch.cat([part[i] for part in parts]) for i in (0, 2))
    up = _block_diagonal([part[1] for part in parts])
    up_grid = grid.spread([part[3] for part in parts], [part[1].shape[1] for part in parts])
    order = torch.argsort(component_norms(down, up, pairs[0].scale), descending=True, stable=True)
    rank = sum(pair.rank for pair in pairs)
    down, up, down_grid, up_grid = (tensor[order].contiguous() for tensor in (down, up, down_grid, up_grid))
    return Operands(down, up, down_grid, up_grid, pairs[0].scale, rank, tuple(pairs[0].weights[0].shape[2:]))


def _block_diagonal(rows: list[Tensor]) -> Tensor:
    """Rows (k_i, n_i) of several parts as rows (sum k_i, sum n_i), zero outside their own part."""
    if len(rows) == 1:
        return rows[0]
    total, offset, found = sum(part.shape[1] for part in rows), 0, []
    for part in rows:
        found.append(torch.nn.functional.pad(part, (offset, total - offset - part.shape[1])))
        offset += part.shape[1]
    return torch.cat(found)
