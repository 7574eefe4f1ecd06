"""Work on many small matrices at once: a thread for each module, not many threads for each tiny product."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

__all__ = ["NEIGHBOURS", "each_batch", "each_module", "is_still_working", "stop_if_cancelled", "stream_batches"]

NEIGHBOURS = 32  # modules that are handed over at once where they gain by it: handing one over takes as long as a small one
_FEW = 4  # where they do not
_TASKS = 256  # for each thread, times the neighbours of a task: at the end no thread has much more to do than the others
_THREAD_NAME = "lora_compress.parallel"
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

    Several calls may overlap, in one thread or in several. None of them changes how many threads torch has anywhere else, and
    numpy's BLAS has its own number of threads again when the last of them has ended.
    """
    with _setting:  # a new thread takes the number from a default that another call may be about to put back
        workers = torch.get_num_threads()
    size = max(min(most, len(names) * most // (_TASKS * workers)), 1)
    pending: deque[tuple[Sequence[str], Future[Mapping[str, Result]]]] = deque()
    work = torch.no_grad()(function)
    _keep_freed_memory()
    workers = max(min(workers, len(names)), 1)
    cancelled = threading.Event()
    with _single_threaded_blas(), _single_threaded_workers(workers, cancelled) as pool:
        try:
            for first in range(0, len(names), size):
                batch = names[first : first + size]
                pending.append((batch, pool.submit(work, batch)))
                if len(pending) > 2 * workers:
                    yield from _in_order(*pending.popleft())
            while pending:
                yield from _in_order(*pending.popleft())
        finally:
            cancelled.set()  # nobody waits for what is still under way
            for _, future in pending:
                future.cancel()


def _in_order(names: Sequence[str], future: Future[Mapping[str, Result]]) -> Iterator[tuple[str, Result]]:
    found = future.result()
    return ((name, found[name]) for name in names)


@cache
def _keep_freed_memory() -> None:
    """Let a large block go, once. glibc hands freed memory back to the system, and clears it anew for the next matrices, until it
    has seen one that large: a tenth of the time of many modules."""
    torch.empty(_LARGE, dtype=torch.uint8)


_setting = threading.RLock()  # it may be asked for again in its own thread: a generator that nobody refers to ends anywhere
_limits: list[Any] = []  # what holds each BLAS library at one thread, once for each call that is in need of it


_worker = threading.local()  # .cancelled: the event that ends the work of a thread of a pool


def stop_if_cancelled() -> None:
    """For work that takes seconds to call now and then: ends it where whoever asked for it was interrupted or has failed.

    Raises:
        CancelledError: in a thread of `stream_batches` whose caller takes no more results.
    """
    cancelled = getattr(_worker, "cancelled", None)
    if cancelled is not None and cancelled.is_set():
        raise CancelledError


@contextmanager
def _single_threaded_workers(count: int, cancelled: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """So many threads, all of them begun, that run torch on one thread each; every other thread has what it had.

    They have ended afterwards, unless a signal interrupts the caller: one decomposition of rank 4096 takes a minute.
    """
    all_begun = threading.Barrier(count)
    pool = ThreadPoolExecutor(count, _THREAD_NAME, initializer=_begin_worker, initargs=(cancelled,))
    are_awaited = True
    try:
        try:
            for begun in [pool.submit(all_begun.wait) for _ in range(count)]:
                begun.result()
        finally:
            all_begun.abort()  # nobody waits on if one of them cannot begin
        yield pool
    except KeyboardInterrupt:
        are_awaited = False
        raise
    finally:
        pool.shutdown(are_awaited, cancel_futures=not are_awaited)


def is_still_working() -> bool:
    """Whether a thread of `stream_batches` is at work in this process, as after an interrupt."""
    return any(thread.name.startswith(_THREAD_NAME) for thread in threading.enumerate())


def _begin_worker(cancelled: threading.Event) -> None:
    _worker.cancelled = cancelled
    _run_torch_on_one_thread()


def _run_torch_on_one_thread() -> None:
    """For the calling thread, which must be a new one.

    `torch.set_num_threads` also sets the number that threads get which start later. Another new thread puts that number back: a
    thread keeps what was set in it.
    """
    with _setting:
        default = torch.get_num_threads()
        torch.set_num_threads(1)
        _in_a_new_thread(lambda: torch.set_num_threads(default))


@contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """Hold each BLAS library of this process (numpy's) at one thread, from the first of overlapping calls to the end of the last.

    threadpoolctl obeys a single thread as long as that lives, and the first call may end in another thread than the last.
    """
    with _setting:
        _limits.append(_limits[-1] if _limits else _in_a_new_thread(lambda: _blas_libraries().limit(limits=1)))
    try:
        yield
    finally:
        with _setting:
            limit = _limits.pop()
            if not _limits:
                with suppress(RuntimeError):  # the interpreter is about to exit, and starts no threads any more
                    _in_a_new_thread(limit.restore_original_limits)


def _in_a_new_thread(function: Callable[[], Result]) -> Result:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@cache
def _blas_libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")
