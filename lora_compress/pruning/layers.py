"""Whole modules: which ones weigh too little to keep, and which ones programs need in order to know the file."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..programs.marks import recognition_marks

__all__ = ["consumer_minimum", "drop_layers"]


def drop_layers(squared_norms: Mapping[str, float], threshold: float, protected: Collection[str] = ()) -> frozenset[str]:
    """Modules whose share of the update, ||dW_m||_F^2 / sum_m ||dW_m||_F^2, is below `threshold`.

    Args:
        squared_norms: ||dW_m||_F^2 by module, or the sum of its squared scores.
        threshold: in [0, 1).
        protected: modules that stay whatever their share; see `consumer_minimum`.
    """
    least = threshold * sum(squared_norms.values())
    return frozenset(name for name, norm in squared_norms.items() if norm < least and name not in protected)


def consumer_minimum(squared_norms: Mapping[str, float], family: str = "") -> frozenset[str]:
    """Modules that must stay, with one component at least, for programs to recognise the file; see `marks.MARKS`.

    Args:
        squared_norms: ||dW_m||_F^2 by module name.
        family: of the model; "": what programs look for in any family stays.
    """
    return frozenset(recognition_marks(squared_norms, family))
