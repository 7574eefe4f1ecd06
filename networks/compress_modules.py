"""The modules of a network of sd-scripts and the updates that they hold: read from live weights, put into them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lora_compress import LowRankUpdate, SettingsError, as_kohya, thin_svd
from lora_compress.training import live_weight
from lora_compress.update import relative_error

__all__ = ["live_update", "module_tensors", "pairs_of"]

logger = logging.getLogger(__name__)

_ROUNDING = 1e-5  # relative error of what is lost by float32 factors alone


def pairs_of(lora: Any) -> list[tuple[nn.Module, nn.Module]]:
    """The pairs (down, up) of a module: one, or one for each projection of a split one."""
    if isinstance(lora.lora_down, nn.ModuleList):
        return list(zip(lora.lora_down, lora.lora_up, strict=True))
    return [(lora.lora_down, lora.lora_up)]


def live_update(lora: Any) -> LowRankUpdate:
    """The update of a module, detached; of a split one the pairs as one: down stacked, (n r, in), up block-diagonal, (out, n r)."""
    downs, ups = zip(*((live_weight(down).detach(), live_weight(up).detach()) for down, up in pairs_of(lora)), strict=True)
    if len(downs) == 1:
        return LowRankUpdate(downs[0], ups[0], float(lora.scale) * lora.lora_dim)
    down, up = torch.cat(downs), torch.block_diag(*ups)
    return LowRankUpdate(down, up, float(lora.scale) * len(down))


def module_tensors(lora: Any, update: LowRankUpdate, file: str) -> dict[str, Tensor]:
    """Tensors of a module's state_dict that make it compute `update`, as far as its rank allows.

    A smaller rank fills the first components and leaves the others as new. A split module takes of each projection's rows the
    strongest components; where that loses anything, the log says how much.

    Raises:
        SettingsError: a module that is not split has a smaller rank than `update`.
    """
    parts = pairs_of(lora)
    if len(parts) == 1:
        return as_kohya({lora.lora_name: _fit(lora.lora_name, file, update, lora)})
    tensors = {f"{lora.lora_name}.alpha": torch.tensor(lora.scale * lora.lora_dim)}
    lost, norm = 0.0, 0.0
    rows = update.up.split([up.weight.shape[0] for _, up in parts])
    for index, ((down, up), part) in enumerate(zip(parts, rows, strict=True)):
        spectrum = thin_svd(LowRankUpdate(update.down, part, update.alpha))
        kept = min(int((spectrum.sigma > 0).sum()), lora.lora_dim)
        lost += float(spectrum.sigma[kept:].square().sum())
        norm += float(spectrum.sigma.square().sum())
        rows_down, rows_up = spectrum.balanced(kept)
        strongest = LowRankUpdate(rows_down, rows_up.T, float(kept))
        fitted = _fill(strongest, down.weight, up.weight, float(lora.scale))
        tensors[f"{lora.lora_name}.lora_down.{index}.weight"] = fitted.down
        tensors[f"{lora.lora_name}.lora_up.{index}.weight"] = fitted.up
    if (error := relative_error(lost, norm)) > _ROUNDING:
        logger.warning("%s: %s: %.2g %% of it do not fit in rank %d", file, lora.lora_name, 100 * error, lora.lora_dim)
    return tensors


def _fit(name: str, file: str, update: LowRankUpdate, lora: Any) -> LowRankUpdate:
    """`update` at the rank and scale of `lora`; as it is where they agree."""
    if update.rank == lora.lora_dim and update.scale == lora.scale:
        return update
    if update.rank > lora.lora_dim:
        raise SettingsError(
            [f"{name} has rank {update.rank}, the network {lora.lora_dim}: raise network_dim, or train with dim_from_weights"], file
        )
    return _fill(update, lora.lora_down.weight, lora.lora_up.weight, float(lora.scale))


def _fill(update: LowRankUpdate, down: Tensor, up: Tensor, scale: float) -> LowRankUpdate:
    """`update` in factors of the sizes of `down` and `up` under another scale; rows of `down` that it does not fill stay."""
    gain = update.scale / scale
    new_down, new_up = down.detach().clone(), torch.zeros_like(up)
    new_down[: update.rank] = update.down.to(new_down) * abs(gain) ** 0.5
    new_up[:, : update.rank] = update.up.to(new_up) * (gain / abs(gain) ** 0.5 if gain else 0.0)
    return LowRankUpdate(new_down, new_up, scale * len(new_down))
