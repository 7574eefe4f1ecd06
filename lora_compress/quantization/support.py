"""What this machine can do of what the settings offer, and why not."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from ..settings.quantization import BITS_ALLOWED

__all__ = ["QuantizationSupport", "check_quantization_support"]

_CODER = "constriction"
_CODER_REMEDY = f"the entropy coder is missing: pip install {_CODER}"
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
    """What this machine can do, by name: the strategies dynamic, static, nf4, mixed and entropy, then cuda and bitsandbytes.

    dynamic, static, nf4 and mixed need nothing but torch. entropy codes with constriction's range coder (writing and
    reading). cuda is where the SVD and the quantizers may run. bitsandbytes is not needed: our NF4 codes are its own, and
    programs that have it read them.

    >>> check_quantization_support()["dynamic"]
    QuantizationSupport(available=True, bits='2, 3, 4, 5, 6, 8', reason='')
    """
    coder, cuda, bitsandbytes = _found(_CODER), torch.cuda.is_available(), _found("bitsandbytes")
    fixed = {name: QuantizationSupport(True, BITS_ALLOWED[name]) for name in ("dynamic", "static", "nf4", "mixed")}
    return fixed | {
        "entropy": QuantizationSupport(coder, BITS_ALLOWED["entropy"], "" if coder else _CODER_REMEDY),
        "cuda": QuantizationSupport(cuda, "as on the CPU", "" if cuda else _CUDA_REMEDY),
        "bitsandbytes": QuantizationSupport(bitsandbytes, "4", "" if bitsandbytes else "not installed, and not needed for nf4"),
    }


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
