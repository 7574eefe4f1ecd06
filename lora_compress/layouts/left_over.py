"""Judges the tensors that no layout has taken: which are carried through, and which make a module unreadable."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..files.dtypes import DTYPE_NAMES, TensorSpec
from .survey import Survey

__all__ = ["refuse_left_over"]

_HARMLESS = re.compile(  # of DoRA, of norms, of a bias, and the layer's own weights
    r"(alpha|dora_scale|lora_magnitude_vector(\.[^.]+)*|reshape_weight|w_norm|b_norm|diff|diff_b|set_weight"
    r"|lora_(B|up)(\.[^.]+)?\.bias|(base_layer\.)?(weight|bias)|.+\.(diff|diff_b|w_norm|b_norm|set_weight))"
)
_OF_AN_UPDATE = re.compile(
    r"\.(lora_(?!magnitude_vector|(B|up)(\.[^.]+)?\.bias)|lokr_|hada_)\w+(\.|$)|_lora_latent|[._]lora_(down|up|[ABab])\.weight$"
)


def refuse_left_over(survey: Survey) -> None:
    """Refuses what no layout has taken and what cannot be carried through as it is."""
    _refuse_parts(survey)
    for key in survey.free():
        dtype = survey.file[key].dtype
        if dtype not in DTYPE_NAMES:
            name = str(dtype).removeprefix("torch.")
            survey.refuse(key, f"is {name}", "a type that programs read from safetensors files", "it is left out")
            survey.claim([key])


def _refuse_parts(survey: Survey) -> None:
    """Refuses modules with a key that no layout has taken: it may well change what the update is."""
    if not survey.modules:
        return  # what the file is instead tells more
    owners = {prefix: module.name for module in survey.modules.values() for prefix in module.prefixes()}
    for key in survey.free():
        prefix = next((prefix for prefix in _prefixes(key) if prefix in owners), "")
        owner, part = owners.get(prefix), key.removeprefix(f"{prefix}.")
        if _is_harmless(part, survey.file[key]) if owner else not _OF_AN_UPDATE.search(key):
            continue
        allowed = "what LoRA modules are known to have (lora_down, lora_up, alpha, dora_scale, bias ...)"
        if owner is None:
            survey.refuse(key, "is a part of an update that is not read here", allowed, "it is left out")
            survey.claim([key])
        elif survey.find(key) is not None:
            survey.refuse(key, f"is a part of the module {owner} that is not known here", allowed, "the module is left out")
            gone = survey.modules.pop(owner, None)
            survey.claim(other for other in survey.free() if gone and other.startswith(gone.prefixes()))


def _prefixes(key: str) -> Iterator[str]:
    """What a key begins with up to each of its dots, the longest first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _is_harmless(part: str, info: TensorSpec) -> bool:
    """Whether a tensor beside an update leaves it as it is."""
    if part == "bias" and len(info.shape) > 1:
        return False  # as large as the weight: AUTOMATIC1111 adds it to the update
    return _HARMLESS.fullmatch(part) is not None
