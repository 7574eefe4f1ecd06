"""Work on many small matrices at once: a thread for each module, not many threads for each tiny product."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

__all__ = ["each_batch", "each_module", "stream_modules"]

_BATCH = 16  # modules: handing one over takes as long as a small one
_HANDED = 4  # modules that a thread is handed at once, where each gets _TASKS such tasks at least
_TASKS = 64

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_module(function: Callable[[str, Item], Result], items: Mapping[str, Item]) -> dict[str, Result]:
    """{name: function(name, item)} in the order of `items`, computed on all of torch's threads; the first error is raised."""
    return dict(stream_modules(function, items))


def each_batch(function: Callable[[Sequence[str]], Mapping[str, Result]], names: Iterable[str]) -> dict[str, Result]:
    """{name: result} in the order of `names`, of a function of a few neighbours at a time; on threads as `each_module`."""
    batches = {batch[0]: batch for batch in _sliced(list(names), _BATCH)}
    found = each_module(lambda _, batch: function(batch), batches)
    return {name: result for batch in found.values() for name, result in batch.items()}


def stream_modules(function: Callable[[str, Item], Result], items: Mapping[str, Item]) -> Iterator[tuple[str, Result]]:
    """(name, function(name, item)) one after the other in the order of `items`, a few modules ahead on all of torch's threads.

    Items are fetched as their turn comes, so a lazy mapping is never in memory as a whole. Each worker runs torch on one
    thread of its own and without gradients: a LoRA has hundreds of matrices too small to share, and threads that wait for
    each other over them cost up to twenty times the work. The same holds for numpy's BLAS.
    """
    workers = threads = torch.get_num_threads()
    names = list(items)
    size = max(min(_HANDED, len(names) // (_TASKS * workers)), 1)
    pending: deque[tuple[list[str], Future[list[Result]]]] = deque()
    work = torch.no_grad()(lambda batch: [function(name, items[name]) for name in batch])
    try:
        with _libraries().limit(limits=1), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for batch in _sliced(names, size):
                    pending.append((batch, pool.submit(work, batch)))
                    if len(pending) > 2 * workers:
                        ready, future = pending.popleft()
                        yield from zip(ready, future.result(), strict=True)
                while pending:
                    ready, future = pending.popleft()
                    yield from zip(ready, future.result(), strict=True)
            finally:
                for _, future in pending:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)  # what a worker set is also the default of every thread that starts later


def _sliced(names: list[str], size: int) -> list[list[str]]:
    """`size` neighbours at a time."""
    return [names[first : first + size] for first in range(0, len(names), size)]


@cache
def _libraries() -> ThreadpoolController:
    """Those that have threads of their own."""
    return ThreadpoolController().select(user_api="blas")
