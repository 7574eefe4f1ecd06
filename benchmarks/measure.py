"""What all benchmarks share: work in a fresh process with its memory watched, and a table of goals and what was reached."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Goal", "Run", "answer", "fresh", "goal_table", "random_weights", "second_step", "settled", "svg_plot", "watched"]

_INTERVAL = 0.002  # seconds between two looks at the memory


@dataclass(frozen=True)
class Run:
    """What a process did: its own account, seconds from start to exit, and its largest anonymous memory in bytes."""

    said: dict[str, Any]
    seconds: float
    peak: int


@dataclass(frozen=True)
class Goal:
    """One number against its goal.

    Args:
        name: what was measured, with its unit.
        goal: the number asked for.
        reached: the number measured.
        at_least: whether more is better; otherwise less is.
    """

    name: str
    goal: float
    reached: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.reached >= self.goal if self.at_least else self.reached <= self.goal


def fresh(script: Path, task: str, interval: float = _INTERVAL, /, **arguments: Any) -> Run:
    """Call `task` of `script` in a fresh Python: its arguments go in and its answer comes out as JSON.

    Anonymous memory is RssAnon of /proc/<pid>/status, looked at every `interval` seconds; mapped pages are no part of it.

    Raises:
        RuntimeError: the process failed; its last lines are in the message.
    """
    command = [sys.executable, str(script), "--task", task, json.dumps({k: _plain(v) for k, v in arguments.items()})]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:  # a pipe holds 64 kB
        process = subprocess.Popen(command, stdout=output, stderr=errors, text=True)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(interval)
        seconds = time.monotonic() - started
        told, complaint = (_text(stream) for stream in (output, errors))
    if process.returncode:
        raise RuntimeError(f"{task} ended with exit status {process.returncode}: {complaint[-2000:]}")
    return Run(json.loads(told.splitlines()[-1]), seconds, peak)


def _text(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read()


def answer(tasks: Mapping[str, Callable[..., dict[str, Any]]], argv: Sequence[str]) -> bool:
    """In the process that `fresh` started: do the task and print what it returns. False in any other process."""
    if len(argv) != 3 or argv[0] != "--task":
        return False
    print(json.dumps(tasks[argv[1]](**json.loads(argv[2]))))
    return True


@contextmanager
def svg_plot(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """Axes of matplotlib, drawn to `path` as SVG at the end; the same numbers make the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, layout="constrained", **options)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def watched(task: Callable[[], Any]) -> tuple[Any, int]:
    """What `task` returns, and the largest anonymous memory of this process while it ran: a part of a process, not the whole."""
    done = threading.Event()
    peak = 0

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous(os.getpid()))
            done.wait(_INTERVAL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return task(), peak
    finally:
        done.set()
        watcher.join()


def second_step(step: Callable[[], Any]) -> dict[str, Any]:
    """Processor time of a step in seconds and the largest anonymous memory while it runs, after one that warms up."""
    step()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what loading and packing has freed
    started = time.process_time()
    _, peak = watched(step)
    return {"seconds": time.process_time() - started, "peak": peak}


def random_weights(model: Any) -> None:
    """Make a model of the meta device one of the CPU, with random weights and no biases."""
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.data.zero_()


def settled(repeats: int, *tasks: Callable[[], Run]) -> list[Run]:
    """The fastest of several runs of each task, with the largest memory of them; tasks take turns."""
    found = []
    for runs in zip(*([task() for task in tasks] for _ in range(repeats)), strict=True):
        best = min(runs, key=lambda run: float(run.said["seconds"]))
        found.append(Run(best.said, best.seconds, max(run.peak for run in runs)))
    return found


def goal_table(goals: Sequence[Goal]) -> str:
    """Goal, what was reached and the ratio of the two, a line each."""
    lines = [f"{'':76}{'goal':>12}{'reached':>12}{'ratio':>8}"]
    for goal in goals:
        ratio = goal.reached / goal.goal if goal.goal else float("inf")
        sign = "at least" if goal.at_least else "at most"
        asked = f"{sign} {goal.goal:.4g}"
        lines.append(f"{goal.name:70}{asked:>18}{goal.reached:12.4g}{ratio:8.2f}  {'met' if goal.met else 'MISSED'}")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value


def _anonymous(pid: int) -> int:
    """RssAnon of a process in bytes, 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)
