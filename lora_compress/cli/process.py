"""What a command owes the shell that started it: streams that can be written, signals that clean up, an exit status that tells."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from ..errors import LoraCompressError
from ..parallel import is_still_working

__all__ = [
    "EXIT_BROKEN_PIPE",
    "OutputError",
    "Terminated",
    "drop_output",
    "exit_status",
    "leave",
    "sound_streams",
    "stoppable",
    "written",
]

EXIT_BROKEN_PIPE = 128 + 13  # as a shell says of a program that SIGPIPE ended
_ENDING = ("SIGTERM", "SIGHUP")  # of those, Windows knows the first alone


class OutputError(LoraCompressError):
    """Standard output cannot be written, because its disk is full for example."""


class Terminated(KeyboardInterrupt):
    """A signal asked this process to end; whatever cleans up after Ctrl+C cleans up after it too."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """128 + the number of the signal, as shells have it: 130 after Ctrl+C, 143 after SIGTERM."""
    return 128 + (interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT)


def leave(status: int) -> NoReturn:
    """End this process. Python would wait for what threads still compute after a signal, which nobody wants any more."""
    if not is_still_working():
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # it cannot be written, or was closed
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Terminated` in the main thread. A signal that is ignored or handled already stays so."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in _ENDING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


@contextlib.contextmanager
def sound_streams() -> Iterator[None]:
    """Inside, both streams take every character: one that their encoding lacks is written as an escape.

    A stream that was closed before this process began becomes one that keeps nothing, so that no file gets its number.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
    before = [(stream, stream.errors) for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    for stream, _ in before:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(OSError, ValueError):  # it cannot be written, or was closed
                stream.reconfigure(errors=errors)


@contextlib.contextmanager
def written() -> Iterator[None]:
    """Write to standard output inside; afterwards it has been handed to the system.

    Raises:
        BrokenPipeError: nobody reads it any more.
        OutputError: it cannot be written.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"standard output: cannot be written ({error.strerror}): free disk space or redirect it elsewhere"
        ) from error


def drop_output() -> None:
    """Forget what standard output still holds: Python would try to write it again at its end, and complain."""
    with contextlib.suppress(OSError, ValueError):  # a stream of another program that calls us
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
