"""LyCORIS LoHa: dW = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise; with t1, t2 each product is CP-decomposed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..files.tensors import TensorFile
from ..names.kernels import unflatten
from ..update import LowRankUpdate
from .peft_config import PeftConfig
from .plain import KOHYA_KEYS, PlainKeys
from .reduce import balanced, svd_of_pair_product
from .sketch import converted, largest_rank
from .survey import LARGEST_CONVERSION, LARGEST_RANK, Layout, Module, ModuleShape, Survey

__all__ = ["LOHA"]

_PARTS = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
_TUCKER = (".hada_t1", ".hada_t2")


def _find(survey: Survey) -> None:
    config = survey.config
    names = dict.fromkeys(name for part in (*_PARTS, *_TUCKER) for name in survey.names(part))
    for name in names:
        tucker = any(name + part in survey.file for part in _TUCKER)
        keys = [name + part for part in (*_PARTS, *(_TUCKER if tucker else ()))]
        if not survey.usable(name, *keys):
            continue
        sizes = _sizes(survey.file, keys)
        if sizes is None:
            found = f"the shapes {', '.join(str(survey.file[key].shape) for key in keys)} do not fit together"
            survey.refuse(keys[0], found, f"two products of one size, rank {LARGEST_RANK} at most", "the module is left out")
            survey.drop(name, keys)
            continue
        outputs, columns, ranks, kernel = sizes
        inputs, kernel = (columns // math.prod(kernel), kernel) if kernel else unflatten(name, columns)
        rank = largest_rank(ranks[0] * ranks[1], outputs, columns)
        scale = lycoris_scale(survey, config, name, ranks[0])
        used = survey.taken(name + ".alpha", name + ".scale")
        load = _loader(survey.file, keys, scale, inputs, kernel)
        shape = ModuleShape(outputs, inputs, kernel, rank)
        text = "LoHa was converted to plain LoRA, its update unchanged to 1e-6"
        survey.tell(converted(text, ranks[0] * ranks[1], outputs, columns), name)
        layout, plain = converted_to(survey.config, name, "loha")
        survey.add(Module(name, layout, shape, (*keys, *used), load, plain, balanced=True))


def converted_to(config: PeftConfig, name: str, layout: str) -> tuple[str, PlainKeys]:
    """The layout of a module that was converted, and its keys in a plain file: those of PEFT's LoRA where PEFT wrote it."""
    if config.of_method(name) not in ("LOHA", "LOKR"):
        return layout, KOHYA_KEYS
    return "peft", PlainKeys.of(name, [f"{name}.lora_A.weight", f"{name}.lora_B.weight"])


def lycoris_scale(survey: Survey, config: PeftConfig, name: str, rank: int | None) -> float:
    """What the matrix of a LyCORIS module is multiplied by: its own scale, alpha / rank, or what PEFT's configuration says.

    Args:
        rank: of the factors; None where there are none, and LyCORIS' alpha stands for nothing.
    """
    if rank is None:
        survey.claim([name + ".alpha"])
    own, alpha = survey.scale(name), survey.alpha(name + ".alpha") if rank else None
    told = None if own is not None or alpha is not None else config.lycoris_scale(name, rank)
    return own if own is not None else alpha / rank if alpha is not None and rank else 1.0 if told is None else told


def _sizes(file: TensorFile, keys: list[str]) -> tuple[int, int, tuple[int, int], tuple[int, ...]] | None:
    """Outputs, columns, both ranks and the kernel where the shapes tell it; None for shapes that do not fit or are too large."""
    shapes = [file[key].shape for key in keys]
    halves = []
    for index in (0, 1):
        a, b = shapes[2 * index], shapes[2 * index + 1]
        if len(keys) == 6:
            t = shapes[4 + index]
            fits = a[0] == t[0] and b[0] == t[1] and len(a) == len(b) == 2
            halves.append((a[1], b[1] * math.prod(t[2:]), t[0], t[2:], fits))
        else:
            fits = a[1] == b[0] and math.prod(a[2:]) == 1
            halves.append((a[0], math.prod(b[1:]), b[0], b[2:], fits))
    (outputs, columns, first, kernel, fits), (outputs2, columns2, second, kernel2, fits2) = halves
    rank = min(first * second, outputs, columns)
    if not (fits and fits2) or (outputs, columns, kernel) != (outputs2, columns2, kernel2):
        return None
    small = rank <= LARGEST_RANK and rank * max(outputs, columns) <= LARGEST_CONVERSION
    return (outputs, columns, (first, second), kernel) if small else None


def _loader(file: TensorFile, keys: list[str], scale: float, inputs: int, kernel: tuple[int, ...]) -> Callable[[], LowRankUpdate]:
    def load() -> LowRankUpdate:
        w1a, w1b, w2a, w2b, *t = (file.read(key).double() for key in keys)
        first, second = (cp_pair(w1a, w1b, t[0]), cp_pair(w2a, w2b, t[1])) if t else (_pair(w1a, w1b), _pair(w2a, w2b))
        return balanced(svd_of_pair_product(first, second), scale, inputs, kernel)

    return load


def cp_pair(a: Tensor, b: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """sum_ij t[i, j, k] a[i, o] b[j, c] as up (out, i) @ down (i, c * k)."""
    return a.T, torch.einsum("ijk,jc->ick", t.flatten(2) if t.dim() > 2 else t.unsqueeze(2), b).flatten(1)


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.flatten(1), b.flatten(1)


LOHA = Layout("loha", _find)
