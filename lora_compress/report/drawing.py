"""Draws specifications of Vega-Lite in a process of its own, which may crash or hang without harm to this one.

vl-convert aborts its process on input that it did not foresee, and takes minutes for some. Its process is started for the first
chart, serves all that follow, and is replaced after a failure. A request and its answer are one line of JSON each.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import threading
from typing import Any

__all__ = ["DrawingError", "draw"]

_PATIENCE = 60.0  # seconds for a chart; most take some hundredths of one, the first about one
_WORKER = """\
import json, sys
sys.path[:] = json.loads(sys.stdin.readline())
import vl_convert
for line in sys.stdin:
    try:
        answer = {"svg": vl_convert.vegalite_to_svg(json.loads(line))}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class DrawingError(Exception):
    """A chart could not be drawn; the message says why."""


def draw(spec: dict[str, Any], patience: float = _PATIENCE) -> str:
    """The SVG of a specification of Vega-Lite.

    Args:
        spec: what is to be drawn; its texts must be clean (see `text.visible`).
        patience: seconds that it may take.

    Raises:
        DrawingError: vl-convert refuses the specification, ends its process or takes too long.
    """
    request = json.dumps(spec)
    with _lock:
        answer = _process().ask(request, patience)
    if "svg" not in answer:
        raise DrawingError(answer["error"])
    svg: str = answer["svg"]
    return svg


class _Process:
    """A process that runs `_WORKER`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a crash says of itself helps nobody here
            encoding="utf-8",
        )
        self._send(json.dumps(sys.path))

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: str, patience: float) -> dict[str, str]:
        """The answer to a request; without a usable one the process is ended."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(patience, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._send(request)
            assert self._process.stdout is not None
            answer: dict[str, str] = json.loads(self._process.stdout.readline())
            return answer
        except (OSError, ValueError):
            self.close()
            return {"error": f"it took over {patience:g} seconds" if late.is_set() else "the drawing program ended unexpectedly"}
        except BaseException:  # interrupted: the answer to this request must not be taken for that to the next
            self.close()
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what it did not read any more
                pipe.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which reading its answer tells
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


_lock = threading.Lock()
_running: _Process | None = None


def _process() -> _Process:
    """The process that draws, started where there is none."""
    global _running
    if _running is None or not _running.alive:
        _running = _Process()
        atexit.register(_running.close)
    return _running
