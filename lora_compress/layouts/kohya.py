"""kohya's layout: `<module>.lora_down.weight`, `<module>.lora_up.weight` and `<module>.alpha`, as sd-scripts writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import FormatError
from ..update import LowRankUpdate
from .pairs import PairStyle, find_pairs
from .survey import Layout, Survey

__all__ = ["KOHYA", "as_kohya", "from_kohya"]

_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_STYLE = PairStyle("kohya", _DOWN, _UP, mid=".lora_mid.weight", keeps_alpha=True)
# Converters that make every dot an underscore, the last one of a module's name too. Other prefixes mean other things there.
_JOINED = tuple(
    PairStyle("kohya", f"_{down}.weight", f"_{up}.weight", alphas=(".alpha", f"_{down}.alpha"), keeps_alpha=True)
    for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B"))
)
_NAME = re.compile(r"^lora_(unet|te\d?|transformer|prior_unet|prior_te)_[^.]+$")
_TWICE = re.compile(r"^lora_(unet_unet|te_text_encoder)_")


def _find(survey: Survey) -> None:
    find_pairs(survey, _STYLE)
    for style in _JOINED:
        find_pairs(survey, style, names=_NAME)
    free = survey.free()
    for name, module in [*survey.modules.items()]:
        match = _TWICE.match(name)
        if match and not any(key.startswith(f"{name}.") for key in free):
            once = f"lora_{match[1].partition('_')[0]}_{name[match.end() :]}"
            if once not in survey.modules:
                survey.rename(name, once, module.plain)
                survey.tell("a prefix that stands twice in the names of layers was taken once, as programs know them", once)


KOHYA = Layout("kohya", _find)


def from_kohya(tensors: Mapping[str, Tensor]) -> tuple[dict[str, LowRankUpdate], dict[str, Tensor]]:
    """Divide tensors into updates by module name, and the tensors that belong to none. A missing or zero alpha means alpha = rank.

    Raises:
        FormatError: a module has only one of its two factors, factors that do not fit, or parts that change what they mean
            (lora_mid, dora_scale).
    """
    names = [key[: -len(_DOWN)] for key in tensors if key.endswith(_DOWN)]
    rest = dict(tensors)
    updates = {}
    for name in names:
        down, up, alpha = rest.pop(name + _DOWN), rest.pop(name + _UP, None), rest.pop(name + _ALPHA, None)
        if up is None:
            raise FormatError(f"{name}: has lora_down.weight but no lora_up.weight")
        if alpha is not None and alpha.numel() != 1:
            raise FormatError(f"{name}: alpha has the shape {tuple(alpha.shape)}, it is a single number")
        value = float(alpha) if alpha is not None else 0.0
        try:
            updates[name] = LowRankUpdate(down, up, value or float(down.shape[0]))
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None
    for key in rest:
        if key.endswith(_UP):
            raise FormatError(f"{key[: -len(_UP)]}: has lora_up.weight but no lora_down.weight")
        if key.partition(".")[0] in updates:
            raise FormatError(f"{key}: a part of a module that is not read here: plain LoRA and LoCon modules are, DoRA is not")
    return updates, rest


def as_kohya(updates: Mapping[str, LowRankUpdate]) -> dict[str, Tensor]:
    """Return tensors under kohya's keys that hold the very factors and alphas of `updates`.

    Example:
        >>> sorted(as_kohya({"lora_unet_x": LowRankUpdate(torch.ones(1, 2), torch.ones(3, 1), alpha=1.0)}))
        ['lora_unet_x.alpha', 'lora_unet_x.lora_down.weight', 'lora_unet_x.lora_up.weight']
    """
    tensors = {}
    for name, update in updates.items():
        tensors[name + _DOWN] = update.down
        tensors[name + _UP] = update.up
        tensors[name + _ALPHA] = torch.tensor(update.alpha, dtype=torch.float32)
    return tensors
