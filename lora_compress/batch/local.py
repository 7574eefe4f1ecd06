"""A batch on this machine: a process for each core, as many as the memory holds."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from .jobs import CompressOptions, Job
from .storage import is_remote
from .work import Compress
from .worker import end_children, start_worker, unheard_interrupts, work

__all__ = ["available_memory", "run_local", "worker_count"]

_PROCESS_BYTES = 700_000_000  # torch itself, and what the compression of a streamed file holds at once
_CGROUP = Path("/sys/fs/cgroup")


def run_local(
    jobs: Sequence[Job], options: CompressOptions, workers: int | None = None, compress: Compress | None = None
) -> Generator[dict[str, Any], None, None]:
    """The outcome of every job (see `run_job`) as it comes, from processes of one torch thread each.

    When a process dies, of memory mostly, the rest goes on with half as many; alone, the file that it died of is given up.
    A process whose parent is gone ends too.
    """
    waiting = list(jobs)
    count = workers or worker_count(jobs, options)
    while waiting:
        lost = []
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start_worker)
        try:
            with unheard_interrupts():
                futures = {pool.submit(work, job, options, compress): job for job in waiting}
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    lost.append(futures[future])
        except BaseException:  # interrupted, or the caller wants no more outcomes
            end_children(others)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        waiting = [job for job in waiting if job in set(lost)]
        if waiting and count == 1:  # one process works in order: the first that is missing is the one it died of
            job = waiting.pop(0)
            error = f"{job.source}: its process died, perhaps for want of memory: free some, or compress this file alone"
            yield {"input": job.source, "output": None, "status": "failed", "error": error, "notes": []}
        count = max(1, count // 2)


def worker_count(jobs: Sequence[Job], options: CompressOptions, cores: int | None = None, memory: int | None = None) -> int:
    """Processes to start: one for a GPU, else as many as there are cores, files, and room for the largest file in each.

    Args:
        cores: that this process may use, unless given.
        memory: free bytes, unless given.
    """
    if options.settings.quantization_device != "cpu":
        return 1
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    memory = available_memory() if memory is None else memory
    largest = max((_size(job.source) for job in jobs if not is_remote(job.source)), default=0)
    fitting = cores if memory is None else memory // (_PROCESS_BYTES + largest)
    return max(1, min(cores, len(jobs), fitting))


def _size(path: str) -> int:
    """Bytes of a file; 0 of one that has gone since it was found, which its own job will say."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def available_memory() -> int | None:
    """Bytes that programs can still take, by the system and by the container; None where neither says."""
    free = []
    if (meminfo := Path("/proc/meminfo")).is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        if "MemAvailable" in lines:
            free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            free.append(int(limit) - int((_CGROUP / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return max(min(free), 0) if free else None
