"""Work on many small matrices at once: a thread for each module, not many threads for each tiny product."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["each_module"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_module(function: Callable[[str, Item], Result], items: Mapping[str, Item]) -> dict[str, Result]:
    """{name: function(name, item)} in the order of `items`, computed on all cores; the first error is raised.

    Each worker runs torch on one thread of its own and without gradients: a LoRA has hundreds of matrices too small to
    share, and threads that wait for each other over them cost up to twenty times the work.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return dict(zip(items, pool.map(torch.no_grad()(function), items.keys(), items.values()), strict=True))
    finally:
        torch.set_num_threads(threads)  # what a worker set is also the default of every thread that starts later
