"""Whole modules: which ones weigh too little to keep, and which ones a program needs in order to know the file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

__all__ = ["consumer_minimum", "drop_layers"]

# By what InvokeAI tells the base model of a Stable Diffusion 1 or 2 LoRA: any module of the first group that the file has
# decides, or one of the others (invokeai/backend/model_manager/util/model_util.py, lora_token_vector_length).
_TELLING = tuple(
    re.compile(pattern)
    for pattern in (
        r"attn2[._](processor[._])?to_[kv](_lora)?$",
        r"time_emb_proj$|[._]emb_layers[._]1$",
        r"self_attn[._][qkv]_proj$",
    )
)


def drop_layers(squared_norms: Mapping[str, float], threshold: float, protected: Collection[str] = ()) -> frozenset[str]:
    """Modules whose share of the update, ||dW_m||_F^2 / sum_m ||dW_m||_F^2, is below `threshold`.

    Args:
        squared_norms: ||dW_m||_F^2 by module, or the sum of its squared scores.
        threshold: in [0, 1).
        protected: modules that stay whatever their share; see `consumer_minimum`.
    """
    least = threshold * sum(squared_norms.values())
    return frozenset(name for name, norm in squared_norms.items() if norm < least and name not in protected)


def consumer_minimum(squared_norms: Mapping[str, float]) -> frozenset[str]:
    """Modules that must stay for programs to recognise the file: at most one, empty where nothing of the kind is in the file.

    InvokeAI tells the base model of an SD1 or SD2 LoRA by the width of an attn2 to_k or to_v (else of a time_emb_proj, else of a
    text encoder's attention) and refuses a file whose last one was dropped. The strongest of the first kind that the file has
    is named, in whichever spelling: lora_unet_..._attn2_to_k, unet....attn2.to_k, attn2.processor.to_k_lora.

    Args:
        squared_norms: ||dW_m||_F^2 by module name.
    """
    for pattern in _TELLING:
        telling = [name for name in squared_norms if pattern.search(name)]
        if telling:
            return frozenset([max(telling, key=lambda name: squared_norms[name])])
    return frozenset()
