"""A process of a batch: how it starts without hearing Ctrl+C, and how it ends in good order when it is told to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from .jobs import CompressOptions, Job
from .work import Compress, run_job

__all__ = ["end_children", "start_worker", "unheard_interrupts", "work"]

_busy = False


@contextlib.contextmanager
def unheard_interrupts() -> Iterator[None]:
    """Processes started inside hear SIGINT only after `start_worker`: while Python starts, they would answer with a traceback.

    A signal that comes meanwhile waits; nothing is lost. Where the system knows no masks, or in another thread, nothing is done.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker() -> None:
    """Prepare this process: one torch thread, an end when it is asked to or when its parent is gone."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def work(job: Job, options: CompressOptions, compress: Compress | None) -> dict[str, Any]:
    """`run_job`, which removes what it has half written when this process is asked to end, and then ends it."""
    global _busy
    try:
        _busy = True
        return run_job(job, options, compress)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    finally:
        _busy = False


def end_children(before: set[Any]) -> None:
    """Ask every child process that is not among those of `before` to end."""
    for child in set(multiprocessing.active_children()) - before:
        child.terminate()


def _stop(number: int, frame: FrameType | None) -> None:
    if _busy:
        raise KeyboardInterrupt
    os._exit(128 + number)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
