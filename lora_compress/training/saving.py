"""From a session to a file: what survived goes through the engine, what was trained quantized is written as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.analysis import Decomposition, by_svd
from ..engine.in_memory import CompressedLora, compress, plain_size
from ..errors import NOT_FINITE, FormatError, SaveError, SettingsError
from ..files.dtypes import TensorSpec
from ..files.metadata import finish_metadata
from ..files.writer import safetensors_size
from ..layouts import as_kohya
from ..layouts.plain import exact_plain
from ..packed.chunks import Chunk, payload_tensor
from ..packed.file import FORMAT_KEY, FORMAT_VERSION, INDEX_KEY, PAYLOAD_KEY, lay_out
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
    grid, settings = session.grid, session.settings
    assert grid is not None
    packed = settings.save_format in ("packed", "both")
    tensors: dict[str, Tensor] = {}
    if packed:
        coded = each_module(lambda name, part: _code(session, name, part), operands)
        updates = {name: decode_module(entry, chunks) for name, (entry, chunks) in coded.items()}
        index, laid_out = lay_out("kohya", [(entry, [Chunk.of(chunk) for chunk in chunks]) for entry, chunks in coded.values()])
        tensors = {INDEX_KEY: index.encode(), PAYLOAD_KEY: payload_tensor(laid_out)}
    else:
        updates = {name: exact_plain(part.update, dtype or torch.float32) for name, part in operands.items()}
        tensors = as_kohya(updates)
    reports, trained = {}, _against_trained(session, updates)
    for name, pairs in _modules(session).items():
        rank = sum(pair.rank for pair in pairs)
        if name in operands:
            lost, norm = squared_error(operands[name].update, updates[name])
            lost = 0.0 if packed else lost  # compared bit by bit when it was coded
            reports[name] = PartReport((1, 1), (rank, len(operands[name].down)), lost, norm, trained[name])
        else:
            reports[name] = PartReport((1, 0), (rank, 0), 0.0, 0.0, trained[name])
    total = sum(reports.values(), PartReport((0, 0), (0, 0), 0.0, 0.0))
    details = (
        settings.as_dict()
        | _told(session)
        | {
            "modules": f"{len(operands)}/{len(reports)}",
            "components": f"{total.components[1]}/{total.components[0]}",
            "relative_error": f"{total.trained_error:.6e}",
            "quantization_device": None,
        }
    )
    finished = finish_metadata(metadata, [u.rank for u in updates.values()], [u.alpha for u in updates.values()], details)
    finished |= {FORMAT_KEY: FORMAT_VERSION} if packed else {}
    after = safetensors_size({key: TensorSpec.of(tensor) for key, tensor in tensors.items()}, finished)
    before = plain_size({name: _whole(pairs) for name, pairs in _modules(session).items()}, dtype)
    return CompressedLora(updates, tensors, finished, CompressionReport.of_modules(reports, (before, after)), settings, exact=True)


def _against_trained(session: TrainingSession, updates: Mapping[str, LowRankUpdate]) -> dict[str, tuple[float, float]]:
    """By module ||dW - dW'||_F^2 and ||dW||_F^2, dW being the weights that are trained, dW' those of the file."""
    return each_module(lambda name, pairs: squared_error(_whole(pairs)[0], updates.get(name)), _modules(session))


def _code(session: TrainingSession, name: str, operands: Operands) -> tuple[ModuleRecord, list[bytes]]:
    """The entry and the chunks of a packed module; whatever the coder makes of it is compared with what was trained."""
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
    return entry, chunks


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
