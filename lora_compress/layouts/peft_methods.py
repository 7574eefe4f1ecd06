"""PEFT's relatives of LoRA that have a tensor between the two factors: AdaLoRA (lora_E) and LoRA-XS (lora_latent_mapping).

    AdaLoRA     dW = lora_alpha / (init_r + 1e-5) * B (A * E)     E (r, 1); peft/tuners/adalora/layer.py, get_delta_weight
    LoRA-XS     dW = lora_alpha / r * B R A                       R (r, r); https://github.com/MohammadrezaBanaei/LoRA-XS

PEFT divides by `ranknum`, which is init_r however many ranks were taken away while training, and is in no file of weights: the
configuration beside them tells it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.tensors import TensorFile
from ..update import LowRankUpdate
from .peft_config import PeftConfig
from .plain import PlainKeys
from .survey import Layout, Module, ModuleShape, Survey

__all__ = ["PEFT_METHODS"]

_SINGULAR = re.compile(r"^(?P<name>.+)\.lora_E(?P<ending>(\.[^.]+)?)$")
_LATENT = re.compile(r"^(?P<name>.+?)(\.(?P<adapter>[^.]+?))?[._]lora_latent(_mapping)?(\.(?P<after>[^.]+?))?(\.weight)?$")
_OTHERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # initializations that change the base model's weights
_STABLE = 1e-5  # that PEFT adds to ranknum
_CONFIG = "adapter_config.json beside a file named adapter_model.safetensors"


@dataclass(frozen=True)
class _Parts:
    """The keys of a module: A (r, in), B (out, r), and the middle, (r, 1) or (r, r)."""

    name: str
    down: str
    up: str
    middle: str

    @property
    def keys(self) -> tuple[str, str, str]:
        return self.down, self.up, self.middle


def _find(survey: Survey) -> None:
    config = survey.config
    for key in survey.free():
        if match := _SINGULAR.match(key):
            name, ending = match["name"], match["ending"]
            _add_adalora(survey, config, _Parts(name, f"{name}.lora_A{ending}", f"{name}.lora_B{ending}", key))
        elif match := _LATENT.match(key):
            name = match["name"]
            ends = [f".{match['adapter'] or match['after']}.weight", ".weight", ".default.weight", ""]
            end = next((end for end in ends if f"{name}.lora_A{end}" in survey.file), ".weight")
            _add_loraxs(survey, config, _Parts(name, f"{name}.lora_A{end}", f"{name}.lora_B{end}", key))
    _tell_of_config(survey, config)


def _add_adalora(survey: Survey, config: PeftConfig, parts: _Parts) -> None:
    if all(key in survey.file and 0 in survey.file[key].shape for key in parts.keys):
        survey.claim(parts.keys)
        survey.tell("AdaLoRA took every rank away: the module changes nothing and is left out", parts.name)
        return
    initial, alpha = config.number(parts.name, "init_r"), config.number(parts.name, "lora_alpha")
    if config.of_method(parts.name) != "ADALORA" or initial is None or alpha is None or initial <= 0:
        found = "is of AdaLoRA, whose strength depends on init_r and lora_alpha, and no configuration tells them"
        survey.refuse(parts.middle, found, f"{_CONFIG}, with peft_type ADALORA", "the module is left out")
        survey.drop(parts.name, parts.keys)
        return
    rank = _rank(survey, parts, (1,))
    if rank:
        _add(survey, parts, rank, (alpha if alpha > 0 else rank) / (initial + _STABLE))
        survey.tell("AdaLoRA was read as plain LoRA: lora_E and the strength are now part of the factors", parts.name)


def _add_loraxs(survey: Survey, config: PeftConfig, parts: _Parts) -> None:
    rank = _rank(survey, parts, None)
    if rank:
        scale = config.scale(parts.name, rank)
        _add(survey, parts, rank, 1.0 if scale is None else scale)
        survey.tell("LoRA-XS was read as plain LoRA: lora_latent_mapping is now part of lora_A", parts.name)


def _rank(survey: Survey, parts: _Parts, columns: tuple[int] | None) -> int:
    """The rank of a module; 0 of one that has been refused."""
    if not survey.usable(parts.name, *parts.keys):
        return 0
    down, up, middle = (survey.file[key].shape for key in parts.keys)
    rank = down[0]
    if up[1] != rank or middle != (rank, *(columns or (rank,))) or len(down) != 2 or len(up) != 2:
        survey.refuse(parts.middle, f"has the shape {middle} between {down} and {up}", "one rank", "the module is left out")
        survey.drop(parts.name, parts.keys)
        return 0
    return rank


def _add(survey: Survey, parts: _Parts, rank: int, scale: float) -> None:
    shape = ModuleShape(survey.file[parts.up].shape[0], survey.file[parts.down].shape[1], (), rank)
    plain = PlainKeys.of(parts.name, [f"{parts.name}.lora_A.weight", f"{parts.name}.lora_B.weight"])
    load = _loader(survey.file, parts, scale * rank)
    survey.add(Module(parts.name, "peft", shape, parts.keys, load, plain, bias_gain=scale))


def _loader(file: TensorFile, parts: _Parts, alpha: float) -> Callable[[], LowRankUpdate]:
    def load() -> LowRankUpdate:
        down, up, middle = (_wide(file.read(key)) for key in parts.keys)
        down = down * middle if middle.shape[1] == 1 else middle @ down
        return LowRankUpdate(down, up, alpha)

    return load


def _wide(tensor: Tensor) -> Tensor:
    """float32 at least, since the product of two numbers of 16 bits is none."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _tell_of_config(survey: Survey, config: PeftConfig) -> None:
    """What the configuration says that the tensors do not show."""
    for about in config.more.values():
        for field in ("use_qalora", "use_bdlora"):
            if about.get(field):
                survey.refuse(config.source, f"says {field}, whose factors are not those of LoRA", "LoRA", "it is ignored")
        begun = about.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(_OTHERS_BASE):
            survey.tell(
                f"the adapter began as {begun}, which changes the base model: it fits the base model that PEFT changes so again, "
                "or has to be converted by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
                config.source,
            )
        if about.get("alora_invocation_tokens"):
            survey.tell("aLoRA applies only after its invocation tokens: as plain LoRA it would apply everywhere", config.source)


PEFT_METHODS = Layout("peft", _find)
