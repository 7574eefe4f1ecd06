"""What this machine can do of what the settings offer, and why not."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from .registry import STRATEGIES
from .strategy import Strategy

__all__ = ["QuantizationSupport", "check_quantization_support"]

_CUDA_REMEDY = "torch finds no CUDA device: quantization_device=cpu does the same work"


@dataclass(frozen=True)
class QuantizationSupport:
    """What is possible with one strategy or device.

    Args:
        available: whether it runs here.
        bits: what `--quantize` takes for it, in words.
        reason: why it does not run, and the remedy; empty where it runs.
    """

    available: bool
    bits: str
    reason: str = ""


def check_quantization_support() -> dict[str, QuantizationSupport]:
    """What this machine can do, by name: the registered strategies, then cuda and bitsandbytes.

    dynamic, static, nf4 and mixed need nothing but torch. entropy codes with constriction's range coder (writing and
    reading). cuda is where the SVD and the quantizers may run. bitsandbytes is not needed: our NF4 codes are its own, and
    programs that have it read them.

    >>> check_quantization_support()["dynamic"]
    QuantizationSupport(available=True, bits='2, 3, 4, 5, 6, 8', reason='')
    """
    cuda, bitsandbytes = torch.cuda.is_available(), _found("bitsandbytes")
    return {name: _support(strategy) for name, strategy in STRATEGIES.items()} | {
        "cuda": QuantizationSupport(cuda, "as on the CPU", "" if cuda else _CUDA_REMEDY),
        "bitsandbytes": QuantizationSupport(bitsandbytes, "4", "" if bitsandbytes else "not installed, and not needed for nf4"),
    }


def _support(strategy: Strategy) -> QuantizationSupport:
    if strategy.package is None or _found(strategy.package):
        return QuantizationSupport(True, strategy.allowed_bits)
    return QuantizationSupport(
        False, strategy.allowed_bits, f"the {strategy.name} coder is missing: pip install {strategy.package}"
    )


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
