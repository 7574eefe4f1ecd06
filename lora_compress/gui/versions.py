"""Gradio 5 and 6 take some options in different places."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["accepted"]


def accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that `function` names among its parameters."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}
