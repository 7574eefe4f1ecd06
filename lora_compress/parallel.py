"""Work on many small matrices at once: a thread for each module, not many threads for each tiny product."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

__all__ = ["NEIGHBOURS", "each_batch", "each_module", "stream_batches"]

NEIGHBOURS = 32  # modules that are handed over at once where they gain by it: handing one over takes as long as a small one
_FEW = 4  # where they do not
_TASKS = 256  # for each thread, times the neighbours of a task: at the end no thread has much more to do than the others
_LARGE = 31 << 20  # bytes; glibc's limit is 32 MiB

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_module(function: Callable[[str, Item], Result], items: Mapping[str, Item]) -> dict[str, Result]:
    """{name: function(name, item)} in the order of `items`, computed on all of torch's threads; the first error is raised.

    Items are fetched as their turn comes, so a lazy mapping is never in memory as a whole.
    """
    return dict(stream_batches(lambda batch: {name: function(name, items[name]) for name in batch}, list(items)))


def each_batch(function: Callable[[Sequence[str]], Mapping[str, Result]], names: Iterable[str]) -> dict[str, Result]:
    """{name: result} in the order of `names`, of a function of a few neighbours at a time; on threads as `each_module`."""
    return dict(stream_batches(function, list(names), NEIGHBOURS))


def stream_batches(
    function: Callable[[Sequence[str]], Mapping[str, Result]], names: Sequence[str], most: int = _FEW
) -> Iterator[tuple[str, Result]]:
    """(name, result) in the order of `names`, of a function of at most `most` neighbours; some calls run ahead on torch's threads.

    Each worker runs torch on one thread of its own and without gradients: a LoRA has hundreds of matrices too small to share,
    and threads that wait for each other over them cost up to twenty times the work. The same holds for numpy's BLAS.
    """
    workers = threads = torch.get_num_threads()
    size = max(min(most, len(names) * most // (_TASKS * workers)), 1)
    pending: deque[tuple[Sequence[str], Future[Mapping[str, Result]]]] = deque()
    work = torch.no_grad()(function)
    _keep_freed_memory()
    try:
        with _libraries().limit(limits=1), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for first in range(0, len(names), size):
                    batch = names[first : first + size]
                    pending.append((batch, pool.submit(work, batch)))
                    if len(pending) > 2 * workers:
                        yield from _in_order(*pending.popleft())
                while pending:
                    yield from _in_order(*pending.popleft())
            finally:
                for _, future in pending:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)  # what a worker set is also the default of every thread that starts later


def _in_order(names: Sequence[str], future: Future[Mapping[str, Result]]) -> Iterator[tuple[str, Result]]:
    found = future.result()
    return ((name, found[name]) for name in names)


@cache
def _keep_freed_memory() -> None:
    """Let a large block go, once. glibc hands freed memory back to the system, and clears it anew for the next matrices, until it
    has seen one that large: a tenth of the time of many modules."""
    torch.empty(_LARGE, dtype=torch.uint8)


@cache
def _libraries() -> ThreadpoolController:
    """Those that have threads of their own."""
    return ThreadpoolController().select(user_api="blas")
